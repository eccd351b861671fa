"""`--branch_from`: an ending of its own for a run, from one of its checkpoints."""

import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from gptbert import schedules
from gptbert.checkpoint import manifest
from gptbert.checkpoint.folder import list_checkpoints, newest_in, read_settings, saved_step, step_of_name
from gptbert.config import TrainConfig
from gptbert.errors import InputError, prefix_errors
from gptbert.io.names import TRAIN_CONFIG, TRAINING_STATE


def settings_of_branch(config: TrainConfig) -> tuple[dict[str, Any], str]:
    """What a branch changes: the learning rate falls linearly from that of the checkpoint to 0 at `max_steps`.

    That is a trapezoid whose peak is the checkpoint's rate, and whose cooldown begins at its step. A branch that has
    checkpoints of its own keeps its rate and where it began.

    Args:
        config: `--branch_from` names the checkpoint, or a run, whose newest one it is at that moment.

    Returns:
        New settings by name, `resume` among them, and a line for the log; without `--branch_from`, none and "".

    Raises:
        InputError: it is not a checkpoint, or the run ends before it, or has checkpoints of something else.
    """
    if config.branch_from is None:
        return {}, ""
    settings: dict[str, Any] = {"schedule": "trapezoid", "warmup_proportion": 0.0}
    for name, value in (
        ("--resume PATH", config.resume not in {None, "auto"}),
        ("--initial_weights", config.initial_weights),
    ):
        if value:
            raise InputError(f"--branch_from and {name} name two starts; leave one out")
    first: int | None
    own = _newest_of(config) if config.resume == "auto" else None
    if own:
        then = _Rate.of(own)
        peak, first = then.peak, then.max_steps - then.cooldown_steps
        is_branch = read_settings(own).get("branch_from") is not None
        if not is_branch or step_of_name(config.branch_from) not in {None, first}:
            what = f"a branch from step {first}" if is_branch else "no branch"
            raise InputError(
                f"--branch_from {config.branch_from}: the run {config.name!r} has checkpoints already, and is {what}; "
                "give another --name"
            )
    else:
        with prefix_errors("--branch_from"):
            path = newest_in(config.branch_from)
            first = saved_step(path)
            if first is None or not (path / TRAINING_STATE).is_file():
                raise InputError(
                    f"{path} holds weights and no run to go on with; --initial_weights starts one from them"
                )
            peak = _Rate.of(path).at(first)
            if peak <= 0:
                raise InputError(f"{path}: its learning rate has fallen to 0; branch off from an earlier checkpoint")
        settings["resume"] = str(path)
    if config.max_steps <= first:
        raise InputError(f"--max_steps {config.max_steps}: the branch begins at step {first} and must end after it")
    settings |= {"learning_rate": peak, "cooldown_proportion": (config.max_steps - first) / config.max_steps}
    line = f"a branch from step {first}: the learning rate falls from {peak:.3g} there to 0 at step {config.max_steps}"
    return settings, line


def _newest_of(config: TrainConfig) -> Path | None:
    """The newest of the run's own checkpoints whose settings are as they were written, or else the newest.

    Damaged ones are set aside later, by the process that owns the run's folder.
    """
    own = list_checkpoints(config.run_dir)
    for path in reversed(own):
        with suppress(InputError):
            manifest.check(path, [TRAIN_CONFIG])
            return path
    return own[-1] if own else None


@dataclass(frozen=True)
class _Rate:
    """The learning rate of a saved run."""

    schedule: str
    peak: float
    warmup_steps: int
    cooldown_steps: int
    max_steps: int

    @classmethod
    def of(cls, path: Path) -> Self:
        """Of the run that wrote a checkpoint; InputError if its settings cannot be."""
        saved = read_settings(path)
        numbers: list[Any] = [
            saved.get(name) for name in ("max_steps", "learning_rate", "warmup_proportion", "cooldown_proportion")
        ]
        if any(type(number) not in {int, float} or not 0 <= number < math.inf for number in numbers):
            raise InputError(f"{path}: its train_config.json has no learning rate that can be: it is damaged")
        max_steps, peak, warmup, cooldown = numbers
        schedule = str(saved.get("schedule", TrainConfig.schedule))
        return cls(schedule, peak, round(max_steps * warmup), round(max_steps * cooldown), round(max_steps))

    def at(self, step: int) -> float:
        """The rate of the update at `step`."""
        shape = self.warmup_steps, self.cooldown_steps, self.max_steps, self.schedule
        return self.peak * schedules.learning_rate_factor(step, *shape)
