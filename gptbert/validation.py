"""Validation, during a run and after it: loss, perplexity and accuracy of both objectives, with the same masks."""

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from gptbert.config import TrainConfig
from gptbert.data import RowStream
from gptbert.distributed import World
from gptbert.metrics import LossSums
from gptbert.model import GPTBert
from gptbert.objectives import Batch, Masking, Objective, causal_batch, masked_batch
from gptbert.sharding import let_go
from gptbert.token_store import TokenStore

_MASK_SEED = 0x5EED_0F_7A11D  # of validation only, whatever the run's seed: runs are compared on the same masks


class Validation:
    """The validation rows of a store, and their evaluation.

    Args:
        config: of the run; says how rows are made, masked and batched, and how many there are.
        store: validation documents.
        world: rows are divided among its ranks; sums are over all of them.
        vocab_size: of the tokenizer, for random tokens in masks.
    """

    def __init__(self, config: TrainConfig, store: TokenStore, world: World, vocab_size: int) -> None:
        self._config = config
        self._world = world
        self._stream = RowStream(store, config.seq_length, shuffle=False)
        self._masking = Masking.of(config, vocab_size, mask_p=config.validation_mask_p, seed=_MASK_SEED)
        self.num_rows = self._stream.slots_per_epoch
        if config.validation_steps:
            self.num_rows = min(self.num_rows, config.validation_steps * config.global_batch_size)

    def __call__(self, model: GPTBert, precision: AbstractContextManager) -> dict[Objective, dict[str, float]]:
        """Evaluate `model`, leaving it in the mode it was in; every rank must call it.

        Returns:
            Per objective: loss, perplexity, accuracy, z_loss, count of labels.
        """
        return self.sums(model, precision).means(self._world)

    @torch.no_grad()
    def sums(self, model: GPTBert, precision: AbstractContextManager) -> LossSums:
        """What `__call__` takes the means of, of this rank's rows; every rank must call it."""
        was_training = model.training
        model.eval()
        sums = LossSums(self._world.device)
        rank, world_size, step = self._world.rank, self._world.world_size, self._config.local_batch_size
        first, end = self.num_rows * rank // world_size, self.num_rows * (rank + 1) // world_size
        most = -(-self.num_rows // world_size)  # rows of a rank: all ranks gather sharded weights equally often
        for row in range(first, first + most, step):
            for batch in self._batches(row, min(step, end - row)):
                with precision:
                    result = model(batch.input_ids, batch.document_ids, batch.labels, batch.objective.causal)
                sums.add(batch.objective, result)
        let_go(model)
        model.train(was_training)
        return sums

    def _batches(self, first: int, count: int) -> list[Batch]:
        """Both objectives' batches of the same rows; of padding if there are none."""
        if count <= 0:
            return [Batch.padding(self._config.seq_length, self._world.device)] * len(Objective)
        rows = self._stream.rows(first, count)
        tokens, document_ids, row_ids = (
            torch.from_numpy(array).to(self._world.device) for array in (rows.tokens, rows.document_ids, rows.row_ids)
        )
        return [masked_batch(tokens, document_ids, row_ids, self._masking), causal_batch(tokens, document_ids)]


def unigram_entropy(tokens: Tensor) -> float:
    """Entropy in nats of the tokens' own frequencies: the loss of the best model that ignores all context."""
    counts = torch.bincount(tokens)
    return torch.special.entr(counts[counts > 0] / counts.sum()).sum().item()
