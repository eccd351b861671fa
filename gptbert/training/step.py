"""A training step: gradients of micro-batches, then one update; operation by operation, or recorded in CUDA graphs."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gptbert.config import TrainConfig
from gptbert.data.micro_batch import MicroBatches
from gptbert.distributed.flat_gradients import FlatGradients
from gptbert.distributed.world import REDUCE_DTYPES, World
from gptbert.model.batch import Batch
from gptbert.model.eval_mode import eval_mode
from gptbert.model.gptbert import GPTBert
from gptbert.monitoring.metrics import LossSums
from gptbert.monitoring.skipped_steps import SkippedSteps
from gptbert.muon import MuonWithAdamW
from gptbert.optim import WeightAverage, update_weights
from gptbert.training.cuda_graph import Recorded, Recorder
from gptbert.training.packed_weights import packed_weights
from kernels import MaskedCrossEntropy


class TrainingStep(ABC):
    """Forward and backward of micro-batches, then clipping, optimizer and average of the weights.

    Attributes:
        parallel_model: the model, in its DDP wrapper if it has one.
        sums: losses of the steps taken since they were last reset.
        skipped_steps: counts the others.
        averaged_ranks: number of ranks whose gradients are averaged, not summed.

    Args:
        config: the run's settings.
        model: compiled or not, on the rank's device or sharded.
        average: of its weights.
        optimizer: of its parameters.
        world: the run's processes.
        micro_batches: of the run.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: GPTBert,
        average: WeightAverage,
        optimizer: Optimizer,
        world: World,
        micro_batches: MicroBatches,
    ) -> None:
        self.parallel_model: nn.Module = model
        self.sums = LossSums(world.device)
        self.skipped_steps = SkippedSteps(world.device)
        self.averaged_ranks = 1
        self._config = config
        self._model = model
        self._average = average
        self._optimizer = optimizer
        self._world = world
        self._step_sums = LossSums(world.device)  # of this step's micro-batches so far
        dtype = torch.bfloat16 if config.mixed_precision else torch.float32
        self._weights = packed_weights(model, world.device, dtype)
        self._lengths, self._takes_one = micro_batches.lengths, micro_batches.are_single
        self._prepare()

    @abstractmethod
    def _prepare(self) -> None:
        """Give the gradients their places; what else a kind of step needs."""

    @abstractmethod
    def accumulate(self, micro_batches: list[Batch], scales: Tensor) -> None:
        """Compute the gradients of a step, without a device sync.

        Args:
            micro_batches: this rank's rows; the same number of them on every rank if the model is sharded.
            scales: [objectives] fp32, factors of the loss sums.
        """

    @abstractmethod
    def update(self, learning_rate: float) -> Tensor:
        """Update the weights, their average and the loss sums, and clear the gradients; without a device sync.

        If the gradient norm is not finite on any rank, nothing changes but the count of skipped steps.

        Args:
            learning_rate: rounded to fp32, as a tensor holds it.

        Returns:
            The global gradient norm before clipping, a scalar on the device.
        """

    def warm_up(self, batch: Batch) -> None:
        """Run forward and backward once, with no effect but compiled code and DDP's buckets."""
        self.forward(batch).total.backward()
        self._clear_gradients()

    @torch.no_grad()
    def warm_up_evaluation(self, batch: Batch) -> None:
        """Run the weights and their average once in eval mode, which compiles separate graphs."""
        for model in (self._model, self._average.model):
            with eval_mode(model), autocast(self._config, self._world.device):
                model.encode(batch.input_ids, batch.document_ids, batch.is_causal)

    def forward(
        self, batch: Batch, scales: Tensor | None = None, dropout_seeds: Tensor | None = None
    ) -> MaskedCrossEntropy:
        """`GPTBert.forward` in the run's precision."""
        with autocast(self._config, self._world.device):
            weights = None if self._weights is None else self._weights.weights
            return self.parallel_model(batch, scales, self._config.z_loss_weight, dropout_seeds, weights)

    @abstractmethod
    def _clear_gradients(self) -> None:
        """Forget the gradients of the step."""

    def _flat_gradients(self, dtype: torch.dtype = torch.float32) -> FlatGradients:
        """One buffer for all gradients, at an address that stays.

        If each step is one micro-batch, matrix products overwrite their gradients instead of adding them to zeros.
        """
        if self._weights is None:
            return FlatGradients(self._model.parameters(), self._world, dtype)
        device = self._world.device
        overwritten = self._weights.made_by_products(self._lengths, device) if self._takes_one else ()
        gradients = FlatGradients(self._model.parameters(), self._world, dtype, overwritten)
        self._weights.add_gradients_directly(overwritten)
        return gradients

    def _begin(self, micro_batches: list[Batch]) -> None:
        if self._weights is not None:
            self._weights.refresh_if_changed()
        if self._takes_one and len(micro_batches) > 1:  # the second would overwrite the first's gradients
            raise RuntimeError(f"{len(micro_batches)} micro-batches in a step of a run whose steps have one each")

    def _add_gradients(self, batch: Batch, scales: Tensor, dropout_seeds: Tensor | None = None) -> None:
        result = self.forward(batch, scales, dropout_seeds)
        result.total.backward()
        self._step_sums.add(result)

    def _update(self, learning_rate: float | Tensor) -> Tensor:
        """The update; returns the gradient norm."""
        self._set_learning_rate(learning_rate)
        copies = None if self._weights is None else self._weights.copies
        gradient_norm = update_weights(self._optimizer, self._model, self._average, self._config.max_gradient, copies)
        if self._weights is not None:
            self._weights.note_update()
        self.sums.add_where(self.skipped_steps.add(gradient_norm), self._step_sums)
        self._step_sums.reset()
        self._clear_gradients()
        return gradient_norm

    def _set_learning_rate(self, learning_rate: float | Tensor) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate


class EagerStep(TrainingStep):
    """Operation by operation, as the host launches them.

    Gradients are reduced over ranks by DDP or FSDP, during the backward of the last micro-batch.
    """

    def _prepare(self) -> None:
        world = self._world
        self.parallel_model = world.wrap(self._model, REDUCE_DTYPES[self._config.reduce_dtype])
        self.averaged_ranks = world.world_size
        has_memory = world.world_size == 1 and self._weights is not None  # DDP has its own
        self._gradients = self._flat_gradients() if has_memory else None

    def accumulate(self, micro_batches: list[Batch], scales: Tensor) -> None:
        """See `TrainingStep.accumulate`."""
        self._begin(micro_batches)
        for index, micro_batch in enumerate(micro_batches):
            with self._world.gradient_sync(self.parallel_model, is_on=index == len(micro_batches) - 1):
                self._add_gradients(micro_batch, scales)

    def update(self, learning_rate: float) -> Tensor:
        """See `TrainingStep.update`."""
        return self._update(_fp32(learning_rate))

    def _clear_gradients(self) -> None:
        if self._gradients is None:
            self._optimizer.zero_grad()
        else:
            self._gradients.zero_()


class RecordedStep(TrainingStep):
    """`EagerStep` as two CUDA graphs over tensors whose addresses stay, with the same results to the bit.

    One graph is the forward and backward of a micro-batch, which adds to the gradients or overwrites them; the other is
    the update, which clears those that are added to. What changes from step to step (rows, scales of the losses,
    dropout's seeds, the learning rate) is copied into tensors that the graphs read. Between the two graphs, gradients
    are summed over ranks in a few large pieces, without DDP's overlap with the backward.

    Graphs are recorded at the second micro-batch of a shape, and at the second update. `MicroBatches` changes shapes a
    few times in a run; the graph of the former shape is dropped first, so that only one is in memory. Muon's update is
    not recorded: PyTorch's takes its learning rate from the host.

    On a CPU the operations are the same, and nothing is recorded.

    Attributes:
        recorder: of both graphs.
    """

    def _prepare(self) -> None:
        world = self._world
        self._gradients = self._flat_gradients(REDUCE_DTYPES[self._config.reduce_dtype])
        self.recorder = Recorder(world.device, world.rank if world.world_size > 1 else None)
        self._passes: dict[tuple[Any, ...], tuple[Batch, Recorded]] = {}  # by a micro-batch's shape
        self._scales: Any = None  # a tensor, made by the first step, as are the seeds
        self._seeds: Tensor | None = None
        self._learning_rate = torch.zeros((), device=world.device)
        self._gradient_norm = torch.zeros((), device=world.device)
        take_step = partial(self._take_step, self._learning_rate)
        self._recorded_update = Recorded(take_step, "the update of the weights", self.recorder)

    def accumulate(self, micro_batches: list[Batch], scales: Tensor) -> None:
        """See `TrainingStep.accumulate`."""
        self._begin(micro_batches)
        self._scales = _refilled(self._scales, scales)
        self._drop_all_but(micro_batches)
        for micro_batch in micro_batches:
            seeds = self._model.dropout_seeds(self._world.device)
            self._seeds = None if seeds is None else _refilled(self._seeds, seeds)
            self._passes_of(micro_batch)()

    def warm_up(self, batch: Batch) -> None:
        """See `TrainingStep.warm_up`; on the recordings' stream.

        Autograd's nodes of parameters keep the stream that they were made on. If one of another stream were left over
        from here, a recording would wait for that stream, which fails.
        """
        self.recorder.run(partial(super().warm_up, batch))

    def update(self, learning_rate: float) -> Tensor:
        """See `TrainingStep.update`."""
        self._gradients.all_reduce()
        if isinstance(self._optimizer, MuonWithAdamW):
            self._take_step(_fp32(learning_rate))
        else:
            self._learning_rate.fill_(learning_rate)
            self._recorded_update()
            self._set_learning_rate(_fp32(learning_rate))  # for checkpoints
        return self._gradient_norm.clone()  # the next step overwrites it

    def _passes_of(self, micro_batch: Batch) -> Recorded:
        """Forward and backward of a micro-batch, with its contents filled in."""
        shape = micro_batch.shape
        if shape not in self._passes:
            batch = micro_batch.clone()
            name = f"forward and backward of {len(batch)} rows"
            self._passes[shape] = batch, Recorded(partial(self._add_recorded, batch), name, self.recorder)
        batch, passes = self._passes[shape]
        batch.copy_(micro_batch)
        return passes

    def _drop_all_but(self, micro_batches: list[Batch]) -> None:
        """Free the memory of graphs of other shapes."""
        outdated = self._passes.keys() - {micro_batch.shape for micro_batch in micro_batches}
        if outdated and self.recorder.is_on:
            self.recorder.wait()
        for shape in outdated:
            del self._passes[shape]

    def _add_recorded(self, batch: Batch) -> None:
        self._add_gradients(batch, self._scales, self._seeds)

    def _take_step(self, learning_rate: float | Tensor) -> None:
        self._gradient_norm.copy_(self._update(learning_rate))

    def _clear_gradients(self) -> None:
        self._gradients.zero_()


def _fp32(number: float) -> float:
    """The number as an fp32 tensor holds it."""
    return float(np.float32(number))


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager[Any]:
    """Context manager of the run's precision, `--mixed_precision`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.mixed_precision)


def _refilled(tensor: Tensor | None, values: Tensor) -> Tensor:
    """The tensor with these values; a new one if there is none."""
    return values.clone() if tensor is None else tensor.copy_(values)
