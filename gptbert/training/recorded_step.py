"""A training step in two CUDA graphs: one for each micro-batch's gradients, and one for the update."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gptbert.config import TrainConfig
from gptbert.distributed.flat_gradients import FlatGradients
from gptbert.distributed.world import REDUCE_DTYPES, World
from gptbert.model.batch import Batch
from gptbert.muon import MuonWithAdamW
from gptbert.optim import WeightAverage
from gptbert.training.cuda_graph import Recorded, Recorder
from gptbert.training.eager_step import EagerStep, fp32


class RecordedStep(EagerStep):
    """As `EagerStep`, with the same bits, over tensors that stay where they are.

    What changes from step to step (rows, scales of the losses, dropout's seeds, the learning rate) is copied into
    tensors that a graph reads. Between the two graphs, gradients are summed over ranks: in a few large pieces, for
    which DDP's overlap with the backward is given up. Graphs are recorded at a step's second micro-batch of a shape,
    and at the second update; `MicroBatches` has one shape for each row length. Muon's update is not recorded: PyTorch's
    takes its learning rate from the host.

    On a CPU nothing is recorded, and the operations are the same.
    """

    def __init__(
        self, config: TrainConfig, model: nn.Module, average: WeightAverage, optimizer: Optimizer, world: World
    ) -> None:
        super().__init__(config, model, average, optimizer, world)
        self.averaged_ranks = 1
        self._recorder = Recorder(world.device, is_main=world.is_main)
        self._gradients = FlatGradients(model.parameters(), world, REDUCE_DTYPES[config.reduce_dtype])
        self._passes: dict[tuple, tuple[Batch, Recorded]] = {}  # by a micro-batch's shape
        self._scales: Tensor | None = None  # like what each step fills in, below as well
        self._seeds: Tensor | None = None
        self._learning_rate = torch.zeros((), device=world.device)
        self._gradient_norm = torch.zeros((), device=world.device)
        take_step = partial(self._take_step, self._learning_rate)
        self._recorded_update = Recorded(take_step, "the update of the weights", self._recorder)

    def accumulate(self, micro_batches: list[Batch], scales: Tensor) -> None:
        """See `EagerStep.accumulate`."""
        self._scales = _refilled(self._scales, scales)
        for micro_batch in micro_batches:
            seeds = self._model.dropout_seeds(self._world.device)
            self._seeds = None if seeds is None else _refilled(self._seeds, seeds)
            self._passes_of(micro_batch)()

    def update(self, learning_rate: float) -> Tensor:
        """See `EagerStep.update`."""
        self._gradients.all_reduce()
        if isinstance(self._optimizer, MuonWithAdamW):
            self._take_step(fp32(learning_rate))
        else:
            self._learning_rate.fill_(learning_rate)
            self._recorded_update()
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate  # for checkpoints
        return self._gradient_norm.clone()  # the next step overwrites it

    def warm_up(self, batch: Batch) -> None:
        """See `EagerStep.warm_up`."""
        self.forward(batch).total.backward()
        self._gradients.zero_()

    def _parallel(self, model: nn.Module, config: TrainConfig, world: World) -> nn.Module:
        del config, world
        return model

    def _passes_of(self, micro_batch: Batch) -> Recorded:
        """Forward and backward of a micro-batch, with its contents filled in."""
        shape = (*micro_batch.labels.shape, micro_batch.num_masked, micro_batch.most_labels)
        if shape not in self._passes:
            batch = micro_batch.clone()
            name = f"forward and backward of {len(batch)} rows"
            self._passes[shape] = batch, Recorded(partial(self._add_recorded, batch), name, self._recorder)
        batch, passes = self._passes[shape]
        batch.copy_(micro_batch)
        return passes

    def _add_recorded(self, batch: Batch) -> None:
        self._add_gradients(batch, self._scales, self._seeds)

    def _take_step(self, learning_rate: float | Tensor) -> None:
        self._gradient_norm.copy_(self._update(learning_rate))
        self._gradients.zero_()


def _refilled(tensor: Tensor | None, values: Tensor) -> Tensor:
    """The tensor with these values; a new one if there is none."""
    return values.clone() if tensor is None else tensor.copy_(values)
