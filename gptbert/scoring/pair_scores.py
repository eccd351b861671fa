"""Minimal pairs during a run (`--pairs_path`): how often the average of the weights prefers the good sentence."""

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import torch

from gptbert.config import TrainConfig
from gptbert.data.hybrid_plan import trained_objectives
from gptbert.distributed.world import World
from gptbert.errors import prefix_errors
from gptbert.model import GPTBert
from gptbert.model.batch import Batch
from gptbert.model.eval_mode import eval_mode
from gptbert.model.objective import Objective
from gptbert.scoring.closing import unknown_line, unknown_share
from gptbert.scoring.likelihood import log_likelihoods, num_forwards, num_predictions
from gptbert.scoring.minimal_pairs import Accuracy, read_pairs
from gptbert.text.encoding import encode_sentences
from gptbert.text.tokenizer import load_tokenizer
from kernels import wanted

BATCH_TOKENS = 8192  # in a forward, as the default of `gptbert score`


class PairScores:
    """A run's minimal pairs, and a model's accuracy on them, as `gptbert score` defines it.

    Args:
        config: `pairs_path` names the files; pairs are scored under the objectives that the run trains.
        world: pairs are split over its ranks.

    Attributes:
        objectives: those that are scored.
        num_predictions: of this rank, in all: tokens that `record` predicts.
        digest: recognizes the pairs.

    Raises:
        InputError: a file is missing, a line is not a pair, or the tokenizer does not know the text.
    """

    def __init__(self, config: TrainConfig, world: World) -> None:
        with prefix_errors("--pairs_path"):
            self._pairs = read_pairs(config.pairs_path)
        tokenizer = load_tokenizer(config.tokenizer_path)
        sentences = encode_sentences(tokenizer, [text for pair in self._pairs for text in (pair.good, pair.bad)])
        unknown = unknown_share(tokenizer, [np.array(ids[1:]) for ids in sentences])
        self._remark = unknown_line(unknown, "--pairs_path")
        self._world = world
        first, end = (len(self._pairs) * number // world.world_size for number in (world.rank, world.rank + 1))
        self._own = sentences[2 * first : 2 * end]
        self.objectives = trained_objectives(config)
        self.num_predictions = len(self.objectives) * num_predictions(self._own)
        self._every = config.score_every
        self.digest = hashlib.sha256(repr([(pair.good, pair.bad) for pair in self._pairs]).encode()).hexdigest()

    def __str__(self) -> str:
        """A line for the first screen."""
        when = f"after every {self._every:,} steps and at the end" if self._every else "at the end"
        names = " and ".join(objective.value for objective in self.objectives)
        return f"scoring {len(self._pairs):,} minimal pairs ({names}) {when} (--score_every); {self._remark}"

    @torch.no_grad()
    def record(
        self,
        model: GPTBert,
        precision: AbstractContextManager[object],
        advance: Callable[[int], object] = lambda _: None,
    ) -> dict[str, float]:
        """Accuracy under each objective, by the name of its record; every rank must call it.

        By the mean over UIDs if every pair has one, which is BLiMP's number, else over all pairs. Nothing is compiled,
        and attention is not fused, since sentences have many lengths, each of which would be compiled anew.

        Args:
            model: its train/eval mode is restored.
            precision: an autocast context or similar.
            advance: called, equally often on every rank, with the number of predictions just made; it may raise. The
                sum is `num_predictions`.
        """
        with (
            eval_mode(model),
            precision,
            torch.compiler.set_stance("force_eager"),
            wanted.without("attention_context"),
        ):
            return {
                f"pairs/{objective.value}/accuracy": self._accuracy(model, objective, advance)
                for objective in self.objectives
            }

    def _accuracy(self, model: GPTBert, objective: Objective, advance: Callable[[int], object]) -> float:
        own = num_forwards(self._own, objective, BATCH_TOKENS)
        most = max(self._world.all_gather(own))
        scores = log_likelihoods(model, self._own, objective, batch_tokens=BATCH_TOKENS, advance=advance)
        padding = Batch.padding(2, self._world.device)
        for _ in range(most - own):  # sharded weights need equally many forwards on every rank
            model.encode(padding.input_ids, padding.document_ids, objective.causal)
            advance(0)
        of_all = np.concatenate(self._world.all_gather(scores.squeeze(1).numpy()))
        return Accuracy.of(self._pairs, of_all[0::2], of_all[1::2]).headline
