"""Functions of the caller's that a run calls; docs/python.md."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from gptbert.distributed.world import World
from gptbert.errors import SharedError, first_line

RecordHook = Callable[[int, dict[str, float]], object]
CheckpointHook = Callable[[int, Path], object]


@dataclass(frozen=True)
class Hooks:
    """Called on the main process only, and never within a step: each costs the device nothing.

    The run's random state is after a hook as it was before.

    Attributes:
        on_step: gets the step and the record of training steps once it is written, every `--log_every` steps; values
            of other steps stay on the device.
        on_validation: gets the step and the record of its validation, once it is written.
        on_checkpoint: gets the step and the checkpoint's folder, once it is complete.
    """

    on_step: RecordHook | None = None
    on_validation: RecordHook | None = None
    on_checkpoint: CheckpointHook | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Of those that are given."""
        return tuple(name for name, hook in vars(self).items() if hook is not None)

    def call(self, name: str, world: World, step: int, value: dict[str, float] | Path) -> None:
        """Call a hook if it is given; every rank must call this.

        Raises:
            InputError: the hook raised an exception; on every rank, with the same message that names the hook.
        """
        hook = getattr(self, name)
        if hook is None:
            return
        failure, message = None, ""
        if world.is_main:
            devices = [world.device] if world.device.type == "cuda" else []
            try:
                with torch.random.fork_rng(devices):  # a hook that loads a model, say, draws random numbers
                    hook(step, value)
            except Exception as error:  # noqa: BLE001  the caller's code may raise anything
                failure = error
                message = f"{name} failed after step {step}: {type(error).__name__}: {first_line(error)}"
        if message := world.all_gather(message)[0]:
            raise SharedError(message) from failure
