"""Texts of which a part is scored: a completion behind its context, a word behind its sentence so far.

Three ways to score a token x_i, by the names of BabyLM's evaluation:

- causal: log p(x_i | `<s>` x_1 … x_{i−1});
- mntp: log p(x_i | the text with `<mask>` for x_i), read from the position before it, as GPT-BERT is trained;
- mlm: the same, read from the position of the `<mask>`, as of a BERT.

Texts are encoded as transformers encodes them with the tokenizer of an exported folder.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from gptbert.errors import InputError
from gptbert.model import GPTBert
from gptbert.model.objective import Objective
from gptbert.scoring.likelihood import log_likelihoods, num_predictions
from gptbert.text.encoding import encode_sentences, encode_with_ends
from gptbert.text.special_tokens import MASK_ID

BACKENDS = {"causal": (Objective.CLM, False), "mntp": (Objective.MLM, False), "mlm": (Objective.MLM, True)}


@dataclass(frozen=True)
class Passage:
    """A text to score.

    Attributes:
        ids: token ids, `<s>` first.
        predicted: positions of the tokens whose log-probabilities are added.
    """

    ids: tuple[int, ...]
    predicted: tuple[int, ...]


def completions(tokenizer: Tokenizer, texts: Sequence[str], starts: Sequence[int]) -> list[Passage]:
    """Passages of which the tokens are scored that end behind a text's first `start` characters.

    A token that lies on both sides is scored, such as a word with the space before it.

    Raises:
        InputError: a text is not UTF-8, or none of its tokens would be scored.
    """
    passages = []
    for (ids, ends), text, start in zip(encode_with_ends(tokenizer, texts), texts, starts, strict=True):
        predicted = tuple(position for position, end in enumerate(ends) if end > start)
        if not predicted:
            raise InputError(f"the tokenizer has no tokens for {text[start:]!r}, which is to be scored in {text!r}")
        passages.append(Passage(tuple(ids), predicted))
    return passages


def next_words(tokenizer: Tokenizer, contexts: Sequence[str], words: Sequence[str]) -> list[list[Passage]]:
    """For each word the passages whose scores add up to its log-probability behind its context, left to right.

    As BabyLM's evaluation has it: a word is encoded by itself, and each of its tokens is one prediction, behind the
    text so far, encoded anew with the tokens before it decoded into it. From the second on, a token is what the
    tokenizer makes of its decoded text.

    Raises:
        InputError: a text is not UTF-8, or a word has no tokens.
    """
    texts, targets, owners = [], [], []
    for index, (context, word, ids) in enumerate(zip(contexts, words, _encode(tokenizer, words), strict=True)):
        if len(ids) == 1:
            raise InputError(f"the tokenizer has no tokens for the word {word!r}")
        so_far = context
        for number, token in enumerate(ids[1:]):
            decoded = tokenizer.decode([token], skip_special_tokens=False)
            texts.append(so_far)
            targets.append(_first_token(tokenizer, decoded, token) if number else token)
            owners.append(index)
            so_far += decoded
    passages: list[list[Passage]] = [[] for _ in words]
    for owner, ids, target in zip(owners, _encode(tokenizer, texts), targets, strict=True):
        passages[owner].append(Passage((*ids, target), (len(ids),)))
    return passages


def with_masks_behind(passage: Passage, number: int) -> Passage:
    """A passage with `<mask>`s behind it: to backends that mask, its last token is the first of several to fill in."""
    return Passage((*passage.ids, *[MASK_ID] * number), passage.predicted)


def score_passages(
    model: GPTBert,
    passages: Sequence[Passage],
    backend: str,
    batch_tokens: int,
    advance: Callable[[int], object] = lambda _: None,
) -> np.ndarray:
    """Log-probabilities [passages] fp64, in nats; `advance` as for `log_likelihoods`, `num_scored` in total.

    Raises:
        InputError: they are not finite.
    """
    objective, at_mask = BACKENDS[backend]
    sentences, predicted = [passage.ids for passage in passages], [passage.predicted for passage in passages]
    scores = log_likelihoods(
        model, sentences, objective, (1.0,), batch_tokens, advance, predicted=predicted, at_mask=at_mask
    )[:, 0].numpy()
    if not np.isfinite(scores).all():
        raise InputError(f"--backend {backend}: the model's scores are not finite, so that its weights are of no use")
    return scores


def num_scored(passages: Sequence[Passage]) -> int:
    """Number of predictions that `score_passages` makes."""
    return num_predictions([passage.ids for passage in passages], [passage.predicted for passage in passages])


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    return encode_sentences(tokenizer, texts, as_transformers=True)


def _first_token(tokenizer: Tokenizer, text: str, token: int) -> int:
    """The first token of a text; a decoder may leave nothing of a token, which then stands for itself."""
    ids = _encode(tokenizer, [text])[0]
    return ids[1] if len(ids) > 1 else token
