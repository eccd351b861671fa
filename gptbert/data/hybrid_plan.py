"""The plan of a run: which rank trains which rows of which objective at each step."""

import math
from copy import copy
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from gptbert.config import TrainConfig
from gptbert.errors import InputError
from gptbert.model.objective import Objective
from gptbert.schedules import batch_sizes, length_factor, length_factors

_BLOCK = 2**12  # steps planned at once, unless that makes more blocks than this
_COLUMNS = {objective: column for column, objective in enumerate(Objective)}


def trained_objectives(config: TrainConfig) -> list[Objective]:
    """The objectives that a run trains at all."""
    is_trained = {
        Objective.MLM: config.hybrid_numerator > 0,
        Objective.CLM: config.hybrid_numerator < config.hybrid_denominator,
    }
    return [objective for objective in Objective if is_trained[objective]]


@dataclass(frozen=True)
class Share:
    """Consecutive rows of one objective: the slots first_slot … first_slot + num_rows · length_factor − 1."""

    objective: Objective
    first_slot: int
    num_rows: int
    length_factor: int


@dataclass(frozen=True)
class _Steps:
    """Consecutive steps of a plan; columns are the objectives."""

    rows: np.ndarray  # [steps, 2]
    factors: np.ndarray  # [steps]
    first_slots: np.ndarray  # [steps + 1, 2]


class HybridPlan:
    """A step's rows and the ranks that train them, as functions of the step alone (docs/model.md#hybrid).

    Memory: the slots before each block of steps, at most 66 KB, and two blocks at 40 bytes per step, of 4,096 steps or
    1/4,096 of the run each, whichever is more.

    Attributes:
        mode: "rank" or "batch".
        length_factors: every factor that occurs in the run, with its first step.
        earlier_slots, earlier_tokens: what `continued` adds to the counts of these settings.

    Raises:
        InputError: in rank mode, the world size is not a multiple of the denominator; or a step is too small for both
            objectives.
    """

    def __init__(self, config: TrainConfig, world_size: int) -> None:
        self.config = config
        self.world_size = world_size
        self.mode = self._choose_mode()
        self.length_factors: dict[int, int] = {}
        self._block_steps = max(_BLOCK, -(-config.max_steps // _BLOCK))
        blocks = -(-config.max_steps // self._block_steps)
        self._block_slots = np.zeros((blocks + 1, 2), np.int64)  # before each block, and after the last
        for block in range(blocks):
            steps = self._draw_block(block)
            self._block_slots[block + 1] = steps.first_slots[-1]
            for factor, index in zip(*np.unique(steps.factors, return_index=True), strict=True):
                self.length_factors.setdefault(int(factor), block * self._block_steps + int(index))
        self._block = lru_cache(maxsize=2)(self._draw_block)  # the trainer asks for the current step and a few ahead
        self.earlier_slots = dict.fromkeys(Objective, 0)
        self.earlier_tokens = 0

    @property
    def row_lengths(self) -> list[int]:
        """Every row length that occurs in the run, in tokens."""
        return [factor * self.config.seq_length for factor in self.length_factors]

    def continued(self, step: int, slots: dict[Objective, int], tokens: int) -> "HybridPlan":
        """The plan of a run resumed at `step` from one with other settings, which trained these slots and tokens.

        Counts before `step` are meaningless then.
        """
        plan = copy(self)
        planned = {objective: self._slots_before(objective, step) for objective in Objective}
        plan.earlier_slots = {objective: slots[objective] - planned[objective] for objective in Objective}
        plan.earlier_tokens = tokens - sum(planned.values()) * self.config.seq_length
        return plan

    def weight(self, objective: Objective) -> float:
        """The objective's weight in the loss: its fraction of the training."""
        masked = self.config.hybrid_numerator / self.config.hybrid_denominator
        return masked if objective is Objective.MLM else 1 - masked

    def num_rows(self, objective: Objective, step: int) -> int:
        """Rows of the objective at `step`, over all ranks."""
        block, index = divmod(step, self._block_steps)
        return int(self._block(block).rows[index, _COLUMNS[objective]])

    def tokens_before(self, step: int) -> int:
        """Tokens (positions of the model's input) in all steps before `step`."""
        slots = sum(self._slots_before(objective, step) for objective in Objective)
        return slots * self.config.seq_length + self.earlier_tokens

    def slots_before(self, objective: Objective, step: int) -> int:
        """Slots of the objective's stream in all steps before `step`: the step's first slot."""
        return self._slots_before(objective, step) + self.earlier_slots[objective]

    def _slots_before(self, objective: Objective, step: int) -> int:
        """The same, as if all steps had had these settings."""
        block, index = divmod(step, self._block_steps)
        return int(self._block(block).first_slots[index, _COLUMNS[objective]])

    def ranks(self, objective: Objective) -> range:
        """The ranks that train the objective."""
        if self.mode == "batch":
            return range(self.world_size)
        masked = self.world_size * self.config.hybrid_numerator // self.config.hybrid_denominator
        return range(masked) if objective is Objective.MLM else range(masked, self.world_size)

    def objectives(self, rank: int) -> tuple[Objective, ...]:
        """The objectives that `rank` trains: a single one in mode "rank"."""
        return tuple(objective for objective in Objective if rank in self.ranks(objective))

    def rows_of_a_rank(self, objective: Objective, step: int) -> int:
        """Maximum over ranks of the objective's rows at `step`."""
        return -(-self.num_rows(objective, step) // max(1, len(self.ranks(objective))))

    def most_rows(self, objective: Objective, factor: int) -> int:
        """Maximum over ranks, and over steps with this length factor, of the objective's rows.

        Within such a range of steps batches never shrink, so the last step has the maximum.
        """
        later = [step for step in self.length_factors.values() if step > self.length_factors[factor]]
        return self.rows_of_a_rank(objective, min(later, default=self.config.max_steps) - 1)

    def shares(self, step: int, rank: int) -> list[Share]:
        """The rows of `step` that `rank` trains; empty shares are omitted."""
        factor = length_factor(self.config, step)
        shares = []
        for objective in Objective:
            ranks = self.ranks(objective)
            if rank not in ranks:
                continue
            rows, index = self.num_rows(objective, step), rank - ranks.start
            first, end = rows * index // len(ranks), rows * (index + 1) // len(ranks)
            if end > first:
                first_slot = self.slots_before(objective, step) + first * factor
                shares.append(Share(objective, first_slot, end - first, factor))
        return shares

    def most_micro_batches(self, step: int, rows: int) -> int:
        """An upper bound, over ranks, of the number of micro-batches of up to `rows` rows at `step`; at least 1."""
        shares = [self.rows_of_a_rank(objective, step) for objective in Objective]
        share = sum(shares) if self.mode == "batch" else max(shares)
        return max(1, -(-share // rows))

    def _draw_block(self, block: int) -> _Steps:
        """A block's steps; past the last block it has no steps, only their would-be first slots."""
        first = block * self._block_steps
        steps = np.arange(first, max(first, min(first + self._block_steps, self.config.max_steps)))
        rows, factors = self._rows(steps), length_factors(self.config, steps)
        slots = np.concatenate([self._block_slots[block : block + 1], rows * factors[:, None]])
        return _Steps(rows, factors, np.cumsum(slots, axis=0))

    def _rows(self, steps: np.ndarray) -> np.ndarray:
        """Rows of (MLM, CLM) [steps, 2]: close to the ratio, and at least one of each if both are trained."""
        total = batch_sizes(self.config, steps)
        numerator, denominator = self.config.hybrid_numerator, self.config.hybrid_denominator
        if numerator in {0, denominator}:
            masked = total if numerator else np.zeros_like(total)
        else:
            if len(small := steps[total < 2]):
                raise InputError(
                    f"--global_batch_size {self.config.global_batch_size} gives step {small[0]} only one row (see "
                    "--batch_reduction, --seq_length_growth); a hybrid of both objectives needs at least two"
                )
            # Python integers, if the product might overflow 64 bits or the quotient a float's 53
            exact = total.astype(object) if denominator >= 2**29 else total
            masked = np.clip((exact * numerator / denominator + 0.5).astype(np.int64), 1, total - 1)
        return np.stack([masked, total - masked], axis=1)

    def _choose_mode(self) -> str:
        denominator = self.config.hybrid_denominator // math.gcd(
            self.config.hybrid_numerator, self.config.hybrid_denominator
        )
        fits = self.world_size % denominator == 0
        if self.config.hybrid_mode == "auto":
            return "rank" if fits else "batch"
        if self.config.hybrid_mode == "rank" and not fits:
            sizes = ", ".join(str(denominator * multiple) for multiple in (1, 2, 3))
            raise InputError(
                f"--hybrid_mode rank with --hybrid_denominator {self.config.hybrid_denominator} needs {sizes}, … "
                f"processes, not {self.world_size}; --hybrid_mode batch works with any number"
            )
        return self.config.hybrid_mode
