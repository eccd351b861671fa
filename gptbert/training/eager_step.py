"""A training step, operation by operation."""

from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gptbert.config import TrainConfig
from gptbert.distributed.world import REDUCE_DTYPES, World
from gptbert.model.batch import Batch
from gptbert.monitoring.metrics import LossSums
from gptbert.monitoring.skipped_steps import SkippedSteps
from gptbert.optim import WeightAverage, update_weights
from kernels import MaskedCrossEntropy


class EagerStep:
    """Forward and backward of micro-batches, then clipping, optimizer and average of the weights.

    Gradients are reduced over ranks by DDP or FSDP, during the backward of the last micro-batch.

    Attributes:
        parallel_model: the model, wrapped by `World.wrap`.
        sums: losses of the steps taken since they were last reset.
        skipped_steps: counts the others.
        averaged_ranks: number of ranks whose gradients are averaged, not summed.

    Args:
        config: the run's settings.
        model: compiled or not, on the rank's device or sharded.
        average: of its weights.
        optimizer: of its parameters.
        world: the run's processes.
    """

    def __init__(
        self, config: TrainConfig, model: nn.Module, average: WeightAverage, optimizer: Optimizer, world: World
    ) -> None:
        self.parallel_model = self._parallel(model, config, world)
        self.sums = LossSums(world.device)
        self.skipped_steps = SkippedSteps(world.device)
        self.averaged_ranks = world.world_size
        self._config = config
        self._model = model
        self._average = average
        self._optimizer = optimizer
        self._world = world
        self._step_sums = LossSums(world.device)  # of this step's micro-batches so far

    def accumulate(self, micro_batches: list[Batch], scales: Tensor) -> None:
        """Compute the gradients of a step, without a device sync.

        Args:
            micro_batches: this rank's rows; the same number of them on every rank if the model is sharded.
            scales: [objectives] fp32, factors of the loss sums.
        """
        for index, micro_batch in enumerate(micro_batches):
            with self._world.gradient_sync(self.parallel_model, is_on=index == len(micro_batches) - 1):
                self._add_gradients(micro_batch, scales)

    def update(self, learning_rate: float) -> Tensor:
        """Update weights, average and sums once by the gradients, and clear those; without a device sync.

        If the gradient norm is not finite on any rank, all but the count of skipped steps is left unchanged.

        Args:
            learning_rate: rounded to fp32, as a recorded step has it.

        Returns:
            The global gradient norm before clipping, a scalar on the device.
        """
        gradient_norm = self._update(fp32(learning_rate))
        self._optimizer.zero_grad()
        return gradient_norm

    def warm_up(self, batch: Batch) -> None:
        """Run forward and backward once, with no effect but compiled code and DDP's buckets."""
        self.forward(batch).total.backward()
        self._optimizer.zero_grad()

    def forward(
        self, batch: Batch, scales: Tensor | None = None, dropout_seeds: Tensor | None = None
    ) -> MaskedCrossEntropy:
        """`GPTBert.forward` in the run's precision."""
        with autocast(self._config, self._world.device):
            return self.parallel_model(batch, scales, self._config.z_loss_weight, dropout_seeds)

    def _parallel(self, model: nn.Module, config: TrainConfig, world: World) -> nn.Module:
        return world.wrap(model, REDUCE_DTYPES[config.reduce_dtype])

    def _add_gradients(self, batch: Batch, scales: Tensor, dropout_seeds: Tensor | None = None) -> None:
        result = self.forward(batch, scales, dropout_seeds)
        result.total.backward()
        self._step_sums.add(result)

    def _update(self, learning_rate: float | Tensor) -> Tensor:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        gradient_norm = update_weights(self._optimizer, self._model, self._average, self._config.max_gradient)
        self.sums.add_where(self.skipped_steps.add(gradient_norm), self._step_sums)
        self._step_sums.reset()
        return gradient_norm


def fp32(number: float) -> float:
    """The number as an fp32 tensor holds it."""
    return float(np.float32(number))


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager:
    """Context manager of the run's precision, `--mixed_precision`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.mixed_precision)
