"""A run's predictions for masks in a few fixed texts, at each validation: progress in readable form.

The texts are excerpts from the middle of validation documents, with the same tokens masked in every run on that file.
A record of `samples.jsonl` is one text at one step: the three likeliest tokens per mask, with their probabilities under
that step's weights (not their average):

    {"step": 1000, "text": "The first<mask> is …", "answers": [" argument"], "guesses": [[[" argument", 0.62], …]]}
"""

from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

from gptbert.config import TrainConfig
from gptbert.data.token_store import TokenStore
from gptbert.distributed.world import World
from gptbert.model import GPTBert
from gptbert.model.eval_mode import eval_mode
from gptbert.text.encoding import decode_behind, encode_prompt
from gptbert.text.special_tokens import BOS_ID, MASK_ID, PAD_ID
from gptbert.text.tokenizer import load_tokenizer, special_ids

NUM_TEXTS = 4
MOST_TOKENS = 48  # per text
MASKED_SHARE = 0.1
TOP = 3  # guesses per mask
_DOCUMENTS = 1000  # searched for texts of full length
_SEED = 20  # of the mask positions; independent of the run's seed, so that runs are compared on the same masks


class Samples:
    """A few texts with masks, for a model to fill in.

    Args:
        config: the run's settings.
        store: validation documents.
        world: provides the device.

    Raises:
        InputError: the tokenizer cannot be read.
    """

    def __init__(self, config: TrainConfig, store: TokenStore, world: World) -> None:
        self._tokenizer = load_tokenizer(config.tokenizer_path)
        self._before = encode_prompt(self._tokenizer, "a")[1:]  # excerpts and answers are not at the start of a text
        texts = _excerpts(store, min(MOST_TOKENS, config.seq_length - 1))
        special = special_ids(self._tokenizer)
        masked = [(text, _places(text, number, special)) for number, text in enumerate(texts)]
        masked = [(text, places) for text, places in masked if len(places)]
        shape = (len(masked), config.seq_length)  # as long as validation's rows, which are compiled already
        input_ids, document_ids = np.full(shape, PAD_ID), np.full(shape, -1)
        self._texts, self._rows, self._columns = [], [], []
        for row, (text, places) in enumerate(masked):
            end = len(text) + 1
            input_ids[row, :end] = [BOS_ID, *text]
            input_ids[row, places + 1] = MASK_ID
            document_ids[row, :end] = 0
            self._rows += [row] * len(places)
            self._columns += places.tolist()  # a mask is predicted from the position before it
            answers = [self._decode(token) for token in text[places]]
            self._texts.append({"text": self._decode(*input_ids[row, 1:end]), "answers": answers})
        self._input_ids = torch.from_numpy(input_ids).to(world.device)  # [texts, T]
        self._document_ids = torch.from_numpy(document_ids).to(world.device)

    @torch.no_grad()
    def __call__(self, model: GPTBert, precision: AbstractContextManager[Any]) -> list[dict[str, Any]]:
        """Have `model` fill in the masks; its train/eval mode is restored. Every rank must call it.

        Returns:
            One record per text, without the step; see the module.
        """
        if not self._texts:
            return []
        with eval_mode(model), precision:
            hidden_states = model.encode(self._input_ids, self._document_ids, causal=False)
            logits = model.logits(hidden_states[self._rows, self._columns])  # [masks, V]
        best = logits.float().softmax(dim=-1).topk(TOP)  # [masks, TOP]
        pairs = [zip(*mask, strict=True) for mask in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
        guesses = iter([[[self._decode(token), round(share, 4)] for token, share in mask] for mask in pairs])
        return [{**text, "guesses": [next(guesses) for _ in text["answers"]]} for text in self._texts]

    def _decode(self, *tokens: int) -> str:
        return decode_behind(self._tokenizer, self._before, list(map(int, tokens)), skip_special_tokens=False)


def _excerpts(store: TokenStore, most_tokens: int) -> list[np.ndarray]:
    """The middle, where headings are rare, of the first documents with `most_tokens`, or else of the longest."""
    starts, lengths = store.documents(0, min(_DOCUMENTS, store.num_documents))
    sizes = np.minimum(lengths, most_tokens)
    starts = starts + (lengths - sizes) // 2
    longest = np.argsort(-sizes, kind="stable")[:NUM_TEXTS]
    tokens, _ = store.gather(starts[longest], sizes[longest])
    return np.split(tokens.astype(np.int64), np.cumsum(sizes[longest])[:-1])


def _places(text: np.ndarray, number: int, special: tuple[int, ...]) -> np.ndarray:
    """Positions to mask in the text of this index, ascending; special tokens are never masked."""
    ordinary = np.flatnonzero(np.isin(text, special, invert=True))
    count = min(len(ordinary), max(1, round(MASKED_SHARE * len(text))))
    return np.sort(np.random.default_rng((_SEED, number)).choice(ordinary, count, replace=False))
