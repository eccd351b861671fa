"""Schedules of a run (docs/model.md#schedules): functions of the global step alone, so that ranks agree."""

import math
from collections.abc import Sequence

import numpy as np

from gptbert.config import TrainConfig

MOST_INITIAL = 0.1  # of a moving average that is worth looking at


def learning_rate_factor(
    step: int, warmup_steps: int, cooldown_steps: int, max_steps: int, schedule: str = "cosine"
) -> float:
    """Fraction of the peak learning rate at `step`, after a linear rise from 0.

    Args:
        step: from 0.
        warmup_steps: of the rise.
        cooldown_steps: of the linear fall to 0 at the end.
        max_steps: of the run.
        schedule: "cosine" to a tenth, and from there to 0. "trapezoid": at the peak, and from there to 0. "constant":
            at the peak to the end.
    """
    if step < warmup_steps:
        return step / warmup_steps
    if schedule == "constant":
        return 1.0
    lowest = 1.0 if schedule == "trapezoid" else 0.1
    if step >= max_steps - cooldown_steps:
        return lowest * (max_steps - step) / max(1, cooldown_steps)
    progress = (step - warmup_steps) / (max_steps - warmup_steps)
    return lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * progress))


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of the update at `step`."""
    shape = config.warmup_steps, config.cooldown_steps, config.max_steps, config.schedule
    return config.learning_rate * learning_rate_factor(step, *shape)


def mask_probability(config: TrainConfig, step: int) -> float:
    """Fraction of tokens masked at `step`, linear from mask_p_start to mask_p_end."""
    return config.mask_p_start + (config.mask_p_end - config.mask_p_start) * step / config.max_steps


def length_factors(config: TrainConfig, steps: np.ndarray) -> np.ndarray:
    """Row length at `steps` in multiples of seq_length, int64: 1, then 2 from 70 % and 4 from 90 % of a growing run."""
    if not config.seq_length_growth:
        return np.ones_like(steps)
    return 1 + (steps >= 0.7 * config.max_steps) + 2 * (steps >= 0.9 * config.max_steps)


def length_factor(config: TrainConfig, step: int) -> int:
    """`length_factors` of one step."""
    return int(length_factors(config, np.array(step)))


def sequence_length(config: TrainConfig, step: int) -> int:
    """Tokens per row at `step`."""
    return config.seq_length * length_factor(config, step)


def batch_sizes(config: TrainConfig, steps: np.ndarray) -> np.ndarray:
    """Rows per step at `steps`, over all ranks and objectives, int64: linear growth, and fewer when rows are longer."""
    first, last = config.global_batch_size / config.batch_reduction, config.global_batch_size
    rows = first + (last - first) * steps / config.max_steps
    return np.maximum(1, (rows / length_factors(config, steps) + 0.5).astype(np.int64))


def batch_size(config: TrainConfig, step: int) -> int:
    """`batch_sizes` of one step."""
    return int(batch_sizes(config, np.array(step)))


def initial_share(ema_decay: float, step: int) -> float:
    """Fraction of the initial weights that their moving average still has after `step` steps."""
    return ema_decay**step


def values(config: TrainConfig, step: int) -> dict[str, float]:
    """All schedules at `step`, under their names in records."""
    return {
        "learning_rate": learning_rate(config, step),
        "batch_size": batch_size(config, step),
        "sequence_length": sequence_length(config, step),
        "mask_p": mask_probability(config, step),
    }


def steps_since_due(step: int, every: int) -> int:
    """Steps from the last multiple of `every` before `step` to `step`: 1 to `every`."""
    return step - (step - 1) // every * every


def is_due(step: int, every: int, max_steps: int, also: Sequence[int] = ()) -> bool:
    """Whether an event with this period is due after `step` steps; after the run's last one it always is.

    Args:
        step: steps completed.
        every: 0 for the end alone.
        max_steps: of the run.
        also: further steps.
    """
    return step == max_steps or (bool(every) and step % every == 0) or step in also
