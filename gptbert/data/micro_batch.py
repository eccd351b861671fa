"""How a rank's rows of a step go through the model: in which pieces, and with room for how many labels."""

from functools import cache

import torch

from gptbert import schedules
from gptbert.config import TrainConfig
from gptbert.data.hybrid_plan import HybridPlan
from gptbert.data.objectives import Batch, Objective, micro_batches
from gptbert.distributed.world import World
from kernels.padding import rounded_rows
from kernels.span_mask import most_selected

_TOKENS = 1024  # that a CPU takes at once for each thread, two of them at least


def micro_batch_rows(config: TrainConfig, length: int, device: torch.device) -> int:
    """Most rows of a micro-batch: a process cuts its share of a step into such, and adds their gradients up.

    On a GPU, `--local_batch_size` of them; longer rows are fewer, so that tokens stay the same. A CPU takes no more
    tokens than its threads share well: on two cores, 2,048 at a time took as long as 4,096, in less memory. Below that,
    steps are slower.

    Args:
        config: with the row length at the run's start, and the most rows of that length that fit into memory.
        length: tokens of each row in this step.
        device: that computes.
    """
    rows = config.local_batch_size * config.seq_length // length
    if device.type == "cpu":
        rows = min(rows, max(2, torch.get_num_threads()) * _TOKENS // length)
    return max(1, rows)


class MicroBatches:
    """The micro-batches of every step, as one rank trains them.

    On a CPU they are as equal as possible, and labels are counted. On a GPU their shapes are the same throughout the
    run for each row length, whatever the schedules say: every one has the same rows of each objective, filled up with
    padding, and room for as many labels as the largest mask share can give. So nothing has to be measured, compiled
    or recorded (as a CUDA graph) again, and the host never waits for a number of labels.

    Args:
        config: of the run.
        plan: which rows a step has.
        world: this rank, and its device.
        has_fixed_shapes: whether shapes are the same throughout; by default on a GPU.
    """

    def __init__(
        self, config: TrainConfig, plan: HybridPlan, world: World, *, has_fixed_shapes: bool | None = None
    ) -> None:
        self._config = config
        self._plan = plan
        self._device = world.device
        self._own = plan.objectives(world.rank)
        self._every = {plan.objectives(rank) for rank in (0, world.world_size - 1)}  # by mode, one of each or both
        self._is_sharded = config.parallel == "fsdp" and world.world_size > 1
        self._most_masked = max(config.mask_p_start, config.mask_p_end)
        self.has_fixed_shapes = world.device.type == "cuda" if has_fixed_shapes is None else has_fixed_shapes
        self._composition = cache(self._compose)

    def padded_rows(self, step: int) -> dict[Objective, int]:
        """Rows of each of this rank's objectives at `step`, the padding included; empty where shapes are not fixed."""
        return {objective: rows * self._count(step) for objective, rows in self._fixed(self._own, step).items()}

    def most_rows(self, objective: Objective, step: int) -> int:
        """Rows of the objective, the padding included, that the rank has at `step` that has most of them."""
        fixed = [rows[objective] for own in self._every if objective in (rows := self._fixed(own, step))]
        return fixed[0] * self._count(step) if fixed else self._plan.rows_of_a_rank(objective, step)

    def cut(self, batches: list[Batch], step: int) -> list[list[Batch]]:
        """The micro-batches of a step.

        Args:
            batches: of this rank, one of each objective that has rows, of which `padded_rows` says how many.
            step: which.

        Returns:
            The parts of each micro-batch, one of each objective that it has rows of.
        """
        if fixed := self._fixed(self._own, step):
            return [
                [batch.rows(piece * fixed[batch.objective], (piece + 1) * fixed[batch.objective]) for batch in batches]
                for piece in range(self._count(step))
            ]
        length = schedules.sequence_length(self._config, step)
        most_rows = micro_batch_rows(self._config, length, self._device)
        pieces = micro_batches(batches, most_rows)
        # for each of them the ranks of a sharded model gather the weights together
        fewest = self._plan.most_micro_batches(step, most_rows) if self._is_sharded else 1
        return pieces + [[Batch.padding(length, self._device)] for _ in range(fewest - len(pieces))]

    def label_capacity(self, batch: Batch) -> int | None:
        """An upper bound of the labels, so that a GPU need not be asked; None where counting them costs nothing."""
        if not self.has_fixed_shapes:
            return None
        rows, length = batch.labels.shape
        if batch.objective is Objective.CLM:
            return rows * length
        return min(rows * length, rounded_rows(rows * most_selected(length + 1, self._most_masked)))

    def _fixed(self, objectives: tuple[Objective, ...], step: int) -> dict[Objective, int]:
        """Rows of each objective in every micro-batch of steps with this row length; empty where they are not fixed."""
        if not self.has_fixed_shapes:
            return {}
        return self._composition(objectives, schedules.length_factor(self._config, step))

    def _compose(self, objectives: tuple[Objective, ...], factor: int) -> dict[Objective, int]:
        """As many rows as a rank ever has, or as fit, in its ratio of the objectives."""
        fitting = micro_batch_rows(self._config, factor * self._config.seq_length, self._device)
        most = {objective: self._plan.most_rows(objective, factor) for objective in objectives}
        most = {objective: rows for objective, rows in most.items() if rows}
        total = sum(most.values())
        if total <= fitting:
            return most
        if fitting < len(most):  # one row at a time, which is of one objective or the other
            return {}
        if len(most) == 1:
            return dict.fromkeys(most, fitting)
        first, second = most
        share = min(max(1, round(fitting * most[first] / total)), fitting - 1)
        return {first: share, second: fitting - share}

    def _count(self, step: int) -> int:
        """Micro-batches of `step`, where shapes are fixed: as many as the rank needs that has most rows."""
        needed = [
            -(-self._plan.rows_of_a_rank(objective, step) // rows)
            for objectives in self._every
            for objective, rows in self._fixed(objectives, step).items()
        ]
        return max([1, *needed])
