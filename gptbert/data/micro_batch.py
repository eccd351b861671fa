"""Micro-batches: how a rank's rows of a step are split, and how many labels each can have."""

import dataclasses
import math
from functools import cache

import torch

from gptbert import schedules
from gptbert.config import TrainConfig
from gptbert.data.hybrid_plan import HybridPlan
from gptbert.distributed.world import World
from gptbert.model.batch import Batch
from gptbert.model.objective import Objective
from kernels.padding import rounded_rows
from kernels.span_mask import most_selected

_TOKENS = 1024  # per CPU thread in a micro-batch, with at least two threads counted


def micro_batch_rows(config: TrainConfig, length: int, device: torch.device, threads: int | None = None) -> int:
    """Maximum number of rows in a micro-batch; a rank accumulates gradients over its micro-batches of a step.

    On a GPU, `--local_batch_size`, scaled down for longer rows so that the number of tokens is constant. On a CPU, also
    at most `_TOKENS` per thread: on two cores, 2,048 tokens at a time took as long as 4,096, in less memory; fewer
    tokens made steps slower.

    Args:
        config: the run's settings; `local_batch_size` applies to rows of `seq_length`.
        length: row length of this step.
        device: the device that trains.
        threads: on a CPU; by default, of this process.
    """
    rows = config.local_batch_size * config.seq_length // length
    if device.type == "cpu":
        rows = min(rows, max(2, threads or torch.get_num_threads()) * _TOKENS // length)
    return max(1, rows)


class MicroBatches:
    """Splits one rank's rows of each step into micro-batches, each with both objectives in about the step's ratio.

    On a CPU they are as equal as possible, and labels are counted. On a GPU, and where steps are recorded
    (`--cuda_graph`), a run has few shapes: the micro-batches of a step have equal numbers of rows of each objective,
    and room for labels, each of which is a multiple of an eighth of the largest at this row length, filled up with
    padding. So a growing batch and a changing mask fraction are recorded anew at most some twelve times in a run, and
    counting labels needs no device sync. For instance, where the largest micro-batch has 8 masked and 24 causal rows,
    a step of 5 and 14 rows takes five eighths of that: 5 and 15.

    Args:
        config: the run's settings.
        plan: the rows of each step.
        world: this rank and its device.
        threads: on CPUs, of the process that has the fewest, so that all split alike; by default, of this one.

    Attributes:
        has_fixed_shapes: whether shapes are fixed; see above.
    """

    def __init__(self, config: TrainConfig, plan: HybridPlan, world: World, threads: int | None = None) -> None:
        self._config = config
        self._plan = plan
        self._device = world.device
        self._threads = threads
        self._objectives = plan.objectives(world.rank)
        # every rank's objectives: MLM ranks come first, CLM ranks last, unless each rank trains both
        self._objectives_of_ranks = {plan.objectives(rank) for rank in (0, world.world_size - 1)}
        self._is_sharded = config.is_sharded(world.world_size)
        self.has_fixed_shapes = world.device.type != "cpu" or config.records_steps(world.device.type)
        self._composed = cache(self._compose)

    @property
    def lengths(self) -> list[int]:
        """All row lengths of the run."""
        return self._plan.row_lengths

    @property
    def are_single(self) -> bool:
        """Whether every step of the run has one micro-batch."""
        return all(
            sum(self._plan.most_rows(objective, length // self._config.seq_length) for objective in objectives)
            <= self._fitting(length)
            for objectives in self._objectives_of_ranks
            for length in self.lengths
        )

    def padded_rows(self, step: int) -> dict[Objective, int]:
        """Rows of each objective of this rank at `step`, including padding; empty if shapes are not fixed."""
        micro_batch = self._micro_batch(self._objectives, step)
        return {objective: rows * self._count(step) for objective, rows in micro_batch.items()}

    def most_rows(self, objective: Objective, step: int) -> int:
        """Largest number of rows of the objective on any rank at `step`, including padding."""
        fixed = [
            rows[objective]
            for objectives in self._objectives_of_ranks
            if objective in (rows := self._micro_batch(objectives, step))
        ]
        return fixed[0] * self._count(step) if fixed else self._plan.rows_of_a_rank(objective, step)

    def cut(self, batch: Batch, step: int) -> list[Batch]:
        """Split a step's rows into micro-batches: the first takes rows 0, n, 2n, … of n micro-batches, and so on.

        Args:
            batch: this rank's rows, padded to `padded_rows`.
            step: the step they belong to.
        """
        length = schedules.sequence_length(self._config, step)
        most_rows = self._fitting(length)
        is_fixed = bool(self._full_micro_batch(self._objectives, step))
        count = self._count(step) if is_fixed else -(-len(batch) // most_rows)
        pieces = [batch[first::count] for first in range(count)]
        if self._is_sharded and not is_fixed:
            # FSDP all-gathers weights in each micro-batch, so every rank needs the same number of them
            missing = self._plan.most_micro_batches(step, most_rows) - count
            pieces += [Batch.padding(length, self._device) for _ in range(missing)]
        return [dataclasses.replace(piece, most_labels=self._most_labels(piece, step)) for piece in pieces]

    def _fitting(self, length: int) -> int:
        """Maximum number of rows of this length in a micro-batch."""
        return micro_batch_rows(self._config, length, self._device, self._threads)

    def _most_labels(self, batch: Batch, step: int) -> int | None:
        """An upper bound on the number of labels, without a device sync; None on a CPU, where counting is free."""
        if not self.has_fixed_shapes:
            return None
        num_rows, length = batch.labels.shape
        largest = max(self._config.mask_p_start, self._config.mask_p_end)
        mask_p = largest and largest * _eighths(schedules.mask_probability(self._config, step) / largest) / 8
        masked = rounded_rows(batch.num_masked * most_selected(length + 1, mask_p))
        return min(masked, batch.num_masked * length) + (num_rows - batch.num_masked) * length

    def _micro_batch(self, objectives: tuple[Objective, ...], step: int) -> dict[Objective, int]:
        """Rows of each objective in every micro-batch of `step`; empty if shapes are not fixed."""
        largest = self._full_micro_batch(objectives, step)
        needed = {key: -(-self._plan.rows_of_a_rank(key, step) // self._count(step)) for key in largest}
        eighths = max((_eighths(needed[key] / rows) for key, rows in largest.items()), default=8)
        return {key: -(-rows * eighths // 8) for key, rows in largest.items()}

    def _full_micro_batch(self, objectives: tuple[Objective, ...], step: int) -> dict[Objective, int]:
        """Rows of each objective in the largest micro-batch at this row length; empty if shapes are not fixed."""
        if not self.has_fixed_shapes:
            return {}
        return self._composed(objectives, schedules.length_factor(self._config, step))

    def _compose(self, objectives: tuple[Objective, ...], factor: int) -> dict[Objective, int]:
        """The most rows a rank ever has at this row length, or the most that fit, in its ratio of the objectives."""
        fitting = self._fitting(factor * self._config.seq_length)
        most = {objective: self._plan.most_rows(objective, factor) for objective in objectives}
        most = {objective: rows for objective, rows in most.items() if rows}
        total = sum(most.values())
        if total <= fitting:
            return most
        if fitting < len(most):  # only one row fits, so a micro-batch has a single objective
            return {}
        if len(most) == 1:
            return dict.fromkeys(most, fitting)
        first, second = most
        share = min(max(1, round(fitting * most[first] / total)), fitting - 1)
        return {first: share, second: fitting - share}

    def _count(self, step: int) -> int:
        """Number of micro-batches of `step` with fixed shapes: enough for the rank with the most rows."""
        needed = [
            -(-self._plan.rows_of_a_rank(objective, step) // rows)
            for objectives in self._objectives_of_ranks
            for objective, rows in self._full_micro_batch(objectives, step).items()
        ]
        return max([1, *needed])


def _eighths(fraction: float) -> int:
    """The fraction in eighths, rounded up: 1 … 8."""
    return min(8, max(1, math.ceil(8 * fraction)))
