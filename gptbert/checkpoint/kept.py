"""The checkpoints that a run keeps: the newest ones, those of `--save_steps`, and the best one (`--keep_best`).

run folder/best.json    {"record": "validation_ema/mlm/loss", "value": 2.31, "step": 6000, "measured_on": "…"}

The best one's checkpoint is complete before best.json names it, and the former best one is deleted after that.
"""

import math
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gptbert import schedules
from gptbert.checkpoint.folder import checkpoint_dir, list_checkpoints, step_of_name
from gptbert.config import TrainConfig
from gptbert.data.hybrid_plan import trained_objectives
from gptbert.distributed.world import World
from gptbert.errors import InputError, first_line
from gptbert.io.files import delete, remove, replacing
from gptbert.io.json_file import read_object, write_json
from gptbert.io.names import BEST, CHECKPOINTS, MEASURES, VALIDATED
from gptbert.io.screen import log
from gptbert.model.objective import Objective


@dataclass(frozen=True)
class Best:
    """The best value of a record so far, and its step.

    `measured_on` describes the data (empty if an earlier version wrote it): values on different data, such as another
    validation file, cannot be compared.
    """

    record: str
    value: float
    step: int
    measured_on: str = ""

    @classmethod
    def of(cls, run_dir: Path) -> "Best | None":
        """That of a run, if it has one whose checkpoint is there.

        Raises:
            InputError: the file is damaged.
        """
        path = run_dir / BEST
        if not path.exists():
            return None
        content = read_object(path)
        wanted: dict[str, Any] = {"record": None, "value": None, "step": None, "measured_on": ""}
        record, value, step, measured_on = (content.get(name, usual) for name, usual in wanted.items())
        is_whole = isinstance(record, str) and type(value) in {int, float} and isinstance(measured_on, str)
        if not (is_whole and type(step) is int and step >= 0):
            raise InputError(f"{path}: expected a record, its value and its step; without the file, the search is new")
        best = cls(record, float(value), step, measured_on)
        return best if best.checkpoint(run_dir).is_dir() else None

    def checkpoint(self, run_dir: Path) -> Path:
        """The checkpoint's folder."""
        return checkpoint_dir(run_dir, self.step)

    def write(self, run_dir: Path) -> None:
        """Replace the file, atomically."""
        with replacing(run_dir / BEST) as file:
            write_json(file, asdict(self))


class BestCheckpoint:
    """Keeps the checkpoint with the best value so far of the record that `--keep_best` names, if it names one.

    Args:
        config: the run's settings.
        world: its processes.
        measured_on: what the record is measured on; see `Best`.
    """

    def __init__(self, config: TrainConfig, world: World, measured_on: str) -> None:
        self._config = config
        self._measured_on = measured_on
        self._world = world

    def start(self, step: int) -> None:
        """Forget a best checkpoint that is gone, or of a step that the run has yet to train again; for the main rank.

        What a killed run left half written or half deleted goes too.

        Args:
            step: that the run goes on from.
        """
        delete_leftovers(self._config.run_dir / CHECKPOINTS)
        best = Best.of(self._config.run_dir)
        if best is None or best.step > step:
            (self._config.run_dir / BEST).unlink(missing_ok=True)

    def is_due(self, step: int) -> bool:
        """Whether this step's checkpoint must be saved, before the record is made."""
        config = self._config
        if config.keep_best is None:
            return False
        every = config.score_every if config.keep_best.startswith("pairs/") else config.validate_every
        return schedules.is_due(step, every, config.max_steps)

    def note(self, step: int, record: dict[str, float]) -> None:
        """Look at the values of this step, whose checkpoint is saved; every rank must call it.

        It comes before the record is written: what a kill undoes is made up with the record.

        Raises:
            InputError: the file cannot be written.
        """
        if self._config.keep_best in record:
            new = Best(self._config.keep_best, record[self._config.keep_best], step, self._measured_on)
            self._world.on_main(self._compare, new)

    def __str__(self) -> str:
        """A line for the end of the run; empty if there is nothing to say."""
        best = Best.of(self._config.run_dir) if self._config.keep_best else None
        if best is None:
            return ""
        return f"best {best.record} {best.value:.4g} after step {best.step}: {best.checkpoint(self._config.run_dir)}"

    def _compare(self, new: Best) -> None:
        former = Best.of(self._config.run_dir)
        if former and former.record == new.record and former.measured_on in {"", new.measured_on}:
            sign = 1 if new.record.endswith("/accuracy") else -1
            # of the same step: a run that was killed before it deleted the former best one makes up this record
            if former.step != new.step and not sign * new.value > sign * former.value:
                return
        if math.isfinite(new.value):
            new.write(self._config.run_dir)
            delete_old(new.checkpoint(self._config.run_dir), self._config)


def check_best(config: TrainConfig) -> None:
    """Refuse a `--keep_best` that is no record of this run.

    Raises:
        InputError: it is not, and the line names those that are; or best.json is damaged.
    """
    Best.of(config.run_dir)
    names = [
        f"{weights}/{objective.value}/{value}" for weights in VALIDATED for objective in Objective for value in MEASURES
    ]
    pairs = [f"pairs/{objective.value}/accuracy" for objective in trained_objectives(config)]
    if config.keep_best in pairs and not config.pairs_path:
        raise InputError(f"--keep_best {config.keep_best}: needs minimal pairs; name their files with --pairs_path")
    if config.pairs_path:
        names += pairs
    if config.keep_best is not None and config.keep_best not in names:
        raise InputError(f"--keep_best {config.keep_best}: no record of this run; expected one of {', '.join(names)}")


def delete_leftovers(folder: Path) -> None:
    """Delete what saves and deletions that were killed left in a folder of checkpoints."""
    for leftover in folder.glob(".step_*"):
        with suppress(OSError):
            remove(leftover)


def delete_old(final: Path, config: TrainConfig) -> None:
    """Delete all but the newest `keep_checkpoints`, which include the one just written, and those kept besides.

    What cannot be deleted, such as a file that another program holds open on NFS, is said and left for the next time.

    Args:
        final: the checkpoint just written.
        config: the run's settings; the best one is kept whatever they are.
    """
    best = Best.of(config.run_dir)
    besides = {*config.save_steps, *([best.step] if best else [])}
    others = [folder for folder in list_checkpoints(config.run_dir) if folder != final]
    others = [folder for folder in others if step_of_name(folder) not in besides]
    for folder in others[: max(0, len(others) + 1 - config.keep_checkpoints)]:
        try:
            delete(folder)
        except OSError as error:
            log(f"{folder}: cannot be deleted whole ({first_line(error)}); the next save tries again")
