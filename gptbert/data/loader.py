"""One rank's rows of each step: prefetched on the host, moved to the device, and masked there."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gptbert import schedules
from gptbert.config import TrainConfig
from gptbert.data.hybrid_plan import Share
from gptbert.data.inputs import Inputs
from gptbert.data.mask_history import MaskHistory
from gptbert.data.micro_batch import MicroBatches
from gptbert.data.objectives import Masking, causal_batch, masked_batch
from gptbert.data.packing import Rows
from gptbert.data.progress import Progress
from gptbert.distributed.world import World
from gptbert.errors import InputError, prefix_errors
from gptbert.model.batch import Batch
from gptbert.model.objective import Objective
from gptbert.text.special_tokens import PAD_ID
from kernels.padding import padded_length

LoadedShare = tuple[Share, dict[str, Tensor]]  # the fields of `Rows`, on the host


class BatchLoader:
    """Loads one rank's rows of a step and turns them into a batch.

    Attributes:
        progress: the streams of training rows, and how far they are read.
        mask_history: mask counts of the training tokens, or None without `--mask_history`.
    """

    def __init__(
        self,
        config: TrainConfig,
        inputs: Inputs,
        world: World,
        micro_batches: MicroBatches,
        progress: Progress,
    ) -> None:
        self._config = config
        self._inputs = inputs
        self.progress = progress
        self._plan = progress.plan
        self._world = world
        self._micro_batches = micro_batches
        self._refusal: str | None = None  # load error of this rank, kept until `raise_load_error`
        self.mask_history = MaskHistory(inputs.num_train_tokens, world) if config.mask_history else None

    def load(self, step: int) -> list[LoadedShare]:
        """This rank's rows of a step, on the host, padded for `span_mask`; runs ahead of the step on another thread.

        If micro-batches have fixed shapes, padding rows fill them up for each objective.

        Invalid rows are left out. Raising here would deadlock the other ranks, so the error is kept until the next
        collective, at a record or checkpoint; see `raise_load_error`.
        """
        return self._load(step, self._read)

    def without_rows(self, step: int) -> list[LoadedShare]:
        """What `load` returns if this rank's rows cannot be read: padding."""
        return self._load(step, self._no_rows)

    def _load(self, step: int, read: Callable[[Share], Rows]) -> list[LoadedShare]:
        padded_rows = self._micro_batches.padded_rows(step)
        shares = {share.objective: share for share in self._plan.shares(step, self._world.rank)}
        factor = schedules.length_factor(self._config, step)
        loaded = []
        for objective in padded_rows or shares:
            share = shares.get(objective, Share(objective, 0, 0, factor))
            rows = read(share)
            num_rows = padded_rows.get(objective, len(rows.row_ids))
            if num_rows:
                loaded.append((share, self._on_host(rows, num_rows)))
        return loaded

    def _read(self, share: Share) -> Rows:
        """The rows of a share; empty if they are invalid."""
        try:
            with prefix_errors("--train_path"):
                if share.num_rows:
                    stream = self.progress.streams[share.objective]
                    return stream.rows(share.first_slot, share.num_rows, share.length_factor)
        except InputError as error:
            self._refusal = str(error)
        return self._no_rows(share)

    def _no_rows(self, share: Share) -> Rows:
        nothing = np.empty((0, share.length_factor * self._config.seq_length + 1), dtype=np.int64)
        return Rows(nothing, nothing, nothing[:, 0], nothing)

    def _on_host(self, rows: Rows, num_rows: int) -> dict[str, Tensor]:
        """The fields of `Rows`, padded to `num_rows` rows and to the row stride of `span_mask`; pinned for a GPU."""
        names = ["tokens", "document_ids", "row_ids", *(["positions"] if self.mask_history else [])]
        columns = padded_length(rows.tokens.shape[1]) - rows.tokens.shape[1]
        tensors = {}
        for name in names:
            tensor = torch.from_numpy(getattr(rows, name))
            padding = [0, columns] * (tensor.ndim - 1) + [0, num_rows - len(tensor)]
            tensor = F.pad(tensor, padding, value=PAD_ID if name == "tokens" else -1)
            tensors[name] = tensor.pin_memory() if self._world.device.type == "cuda" else tensor
        return tensors

    def raise_load_error(self) -> None:
        """Raise this rank's load error, if it has one.

        Raises:
            InputError: a token id is outside the vocabulary.
        """
        if self._refusal:
            raise InputError(self._refusal)

    def batch(self, loaded: list[LoadedShare], step: int) -> Batch:
        """Move rows to the device and build their inputs and labels there; without any, a row of padding."""
        device = self._world.device
        batches, masked_positions = [], None
        for share, tensors in loaded:
            # from memory that is pinned; with other, copies to Apple's MPS may come after what reads them
            is_pinned = device.type == "cuda"
            on_device = {name: tensor.to(device, non_blocking=is_pinned) for name, tensor in tensors.items()}
            width = share.length_factor * self._config.seq_length + 1
            tokens, document_ids = (on_device[name][:, :width] for name in ("tokens", "document_ids"))
            if share.objective is Objective.CLM:
                batches.append(causal_batch(tokens, document_ids))
                continue
            counts = None
            if self.mask_history:
                masked_positions = on_device["positions"][:, 1:width]
                counts = self.mask_history.lookup(on_device["positions"])[:, :width]
            batches.append(masked_batch(tokens, document_ids, on_device["row_ids"], self._masking(step), counts))
        batch = Batch.cat(batches or [Batch.padding(schedules.sequence_length(self._config, step), device)])
        if self.mask_history:
            self._count_masks(self.mask_history, batch, masked_positions, step)
        return batch

    def _masking(self, step: int) -> Masking:
        config, inputs = self._config, self._inputs
        return Masking(
            schedules.mask_probability(config, step),
            config.mask_random_p,
            config.mask_keep_p,
            inputs.vocab_size,
            inputs.special_ids,
            config.seed,
        )

    def _count_masks(self, history: MaskHistory, batch: Batch, positions: Tensor | None, step: int) -> None:
        """Add this step's masked tokens of all ranks to the mask history; every rank must call it.

        `positions` [num_masked, T] are those of the labels; None: no row is masked.
        """
        labels = batch.labels[: batch.num_masked if positions is not None else 0]
        positions = labels if positions is None else positions
        history.update(positions, labels, self._micro_batches.most_rows(Objective.MLM, step))
