"""Validation during and after a run: loss, perplexity and accuracy of both objectives, always with the same masks."""

import reprlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptbert.checkpoint import manifest
from gptbert.checkpoint.folder import SETTINGS_BYTES
from gptbert.config import TrainConfig
from gptbert.data.objectives import Masking, causal_batch, masked_batch
from gptbert.data.packing import Rows, RowStream
from gptbert.data.token_store import TokenStore
from gptbert.distributed.world import World
from gptbert.errors import InputError, first_line
from gptbert.io.json_file import read_json
from gptbert.io.names import MANIFEST, MEASURES, TRAIN_CONFIG
from gptbert.model import GPTBert
from gptbert.model.batch import Batch
from gptbert.model.eval_mode import eval_mode
from gptbert.model.objective import Objective
from gptbert.monitoring.metrics import LossSums

DEFAULT_TOKENS = 2**18  # of a validation without --validation_steps, unless the file has fewer
_MASK_SEED = 0x5EED_0F_7A11D  # independent of the run's seed, so that runs are compared on the same masks


@dataclass(frozen=True)
class ValidationSettings:
    """The settings that validation depends on, named as in `TrainConfig`."""

    seq_length: int
    local_batch_size: int
    global_batch_size: int
    validation_steps: int | None
    validation_mask_p: float
    mask_random_p: float
    mask_keep_p: float
    mixed_precision: bool

    @classmethod
    def of(cls, config: TrainConfig) -> "ValidationSettings":
        """Those of a training run."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})

    @classmethod
    def from_json(cls, path: Path) -> "ValidationSettings":
        """Those in a checkpoint's `train_config.json`; `TrainConfig`'s default for any that is missing.

        Args:
            path: the checkpoint's folder.

        Raises:
            InputError: the file is damaged, or missing though the folder's manifest lists it.
        """
        file = path / TRAIN_CONFIG
        try:
            if (path / MANIFEST).exists():
                manifest.check(path, [file.name])
            content = read_json(file, SETTINGS_BYTES) if file.exists() else {}
            settings = cls(**{name: content.get(name, getattr(TrainConfig, name)) for name in cls.__annotations__})
        except (InputError, OSError, ValueError, AttributeError) as error:
            raise InputError(f"{file}: missing or damaged ({first_line(error)})") from error
        for name, value in asdict(settings).items():
            usual = getattr(TrainConfig, name)
            kind = int if usual is None else type(usual)
            if type(value) not in ({int, float} if kind is float else {kind, type(usual)}):
                raise InputError(f"{file}: {name} is {reprlib.repr(value)}, expected one of type {kind.__name__}")
        return settings


class Validation:
    """A store's validation rows, and their evaluation.

    Args:
        settings: how rows are made, masked and batched, and how many of them.
        store: validation documents.
        world: rows are split over its ranks; means are over all of them.
        vocab_size: the tokenizer's, to draw random replacement tokens.
        special_ids: the tokenizer's, which are neither masked nor drawn.

    Attributes:
        num_rows: that are evaluated: all, or always the same ones, spread evenly over the file.
    """

    def __init__(
        self,
        settings: ValidationSettings,
        store: TokenStore,
        world: World,
        vocab_size: int,
        special_ids: tuple[int, ...],
    ) -> None:
        self._settings = settings
        self._world = world
        self._stream = RowStream(store, settings.seq_length, shuffle=False)
        self._masking = Masking(
            mask_p=settings.validation_mask_p,
            random_p=settings.mask_random_p,
            keep_p=settings.mask_keep_p,
            vocab_size=vocab_size,
            special_ids=special_ids,
            seed=_MASK_SEED,
        )
        self.num_rows = self._stream.slots_per_epoch
        if settings.validation_steps is None:
            self.num_rows = min(self.num_rows, -(-DEFAULT_TOKENS // settings.seq_length))
        elif settings.validation_steps:
            self.num_rows = min(self.num_rows, settings.validation_steps * settings.global_batch_size)

    @property
    def coverage(self) -> str:
        """Which rows are evaluated, for the log; empty for all."""
        if self.num_rows == self._stream.slots_per_epoch:
            return ""
        return f"{self.num_rows:,} of {self._stream.slots_per_epoch:,} rows, spread evenly over the file"

    def __str__(self) -> str:
        """The rows and masks, without the file; validations with equal strings can be compared."""
        settings = self._settings
        masks = f"{settings.validation_mask_p:g}, {settings.mask_random_p:g}, {settings.mask_keep_p:g}"
        return f"{self.num_rows} rows of {settings.seq_length} tokens, masks {masks}"

    def rows_of(self, rank: int) -> range:
        """The rows that a rank evaluates."""
        first, end = (self.num_rows * number // self._world.world_size for number in (rank, rank + 1))
        return range(first, end)

    def __call__(
        self, model: GPTBert, precision: AbstractContextManager[Any], advance: Callable[[int], object] = lambda _: None
    ) -> dict[Objective, dict[str, float]]:
        """Evaluate `model`; its train/eval mode is restored. Every rank must call it.

        Returns:
            Per objective: loss, perplexity, accuracy, z_loss, count of labels.
        """
        return self.sums(model, precision, advance).means(self._world)

    def record(
        self,
        models: Mapping[str, GPTBert],
        precision: AbstractContextManager[Any],
        advance: Callable[[int], object] = lambda _: None,
    ) -> dict[str, float]:
        """Loss, perplexity and accuracy of models by the names of their records; every rank must call it."""
        return {
            f"{prefix}/{objective.value}/{name}": values[name]
            for prefix, model in models.items()
            for objective, values in self(model, precision, advance).items()
            for name in MEASURES
        }

    @torch.no_grad()
    def sums(
        self, model: GPTBert, precision: AbstractContextManager[Any], advance: Callable[[int], object] = lambda _: None
    ) -> LossSums:
        """The sums over this rank's rows, of which `__call__` takes the means; every rank must call it.

        Args:
            model: its train/eval mode is restored.
            precision: an autocast context or similar.
            advance: called, equally often on every rank, with the number of rows just finished; it may raise. The sum
                over all ranks is `num_rows`.
        """
        sums = LossSums(self._world.device)
        step, own = self._settings.local_batch_size, self.rows_of(self._world.rank)
        most = -(-self.num_rows // self._world.world_size)  # sharded weights need equally many forwards on every rank
        with eval_mode(model):
            for row in range(own.start, own.start + most, step):
                for batch in self._batches(row, min(step, own.stop - row)):
                    with precision:
                        sums.add(model(batch))
                advance(max(0, min(step, own.stop - row)))
        return sums

    def _batches(self, first: int, count: int) -> list[Batch]:
        """Both objectives' batches of the same rows; batches of padding if `count` is not positive."""
        if count <= 0:
            return [Batch.padding(self._settings.seq_length, self._world.device)] * len(Objective)
        rows = self._rows(first, count)
        tokens, document_ids, row_ids = (
            torch.from_numpy(array).to(self._world.device) for array in (rows.tokens, rows.document_ids, rows.row_ids)
        )
        return [masked_batch(tokens, document_ids, row_ids, self._masking), causal_batch(tokens, document_ids)]

    def _rows(self, first: int, count: int) -> Rows:
        """Consecutive ones of the evaluated rows."""
        if self.num_rows == self._stream.slots_per_epoch:
            return self._stream.rows(first, count)
        slots = [row * self._stream.slots_per_epoch // self.num_rows for row in range(first, first + count)]
        rows = [self._stream.rows(slot, 1) for slot in slots]
        return Rows(*(np.concatenate([getattr(row, field.name) for row in rows]) for field in fields(Rows)))


def unigram_entropy(tokens: Tensor) -> float:
    """Entropy in nats of the token frequencies: the loss of the best model that ignores context."""
    counts = torch.bincount(tokens)
    return torch.special.entr(counts[counts > 0] / counts.sum()).sum().item()
