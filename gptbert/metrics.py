"""Sums that stay on the device between log records, and the places records go to."""

import errno
import json
import math
import netrc
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from gptbert.config import TrainConfig
from gptbert.distributed import World
from gptbert.errors import InputError, first_line
from gptbert.objectives import Objective
from gptbert.progress import say
from kernels import MaskedCrossEntropy

_LONGEST_RECORD = 1 << 20  # bytes of a line; a longer one is damage


class LossSums:
    """Per objective: summed loss, z-loss, correct predictions and labels, as one fp64 tensor on the device.

    Attributes:
        sums: [objectives, 4] fp64; nothing reads it back before `means`.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(len(Objective), 4, dtype=torch.float64, device=device)

    def add(self, objective: Objective, result: MaskedCrossEntropy) -> None:
        """Add the sums of one forward pass."""
        row = list(Objective).index(objective)
        self.sums[row] += torch.stack(
            [value.double() for value in (result.loss, result.z_loss, result.correct, result.count)]
        )

    def add_where(self, condition: Tensor, other: "LossSums") -> None:
        """Add the sums of `other` if the condition, a bool scalar on the device, holds."""
        self.sums += torch.where(condition, other.sums, 0.0)

    def means(self, world: World) -> dict[Objective, dict[str, float]]:
        """Means over the labels of all ranks, for each objective that had any; every rank must call it."""
        sums = world.all_reduce_sum(self.sums.clone()).tolist()
        return {
            objective: {
                "loss": loss / count,
                "perplexity": perplexity(loss / count),
                "accuracy": correct / count,
                "z_loss": z_loss / count,
                "count": count,
            }
            for objective, (loss, z_loss, correct, count) in zip(Objective, sums, strict=True)
            if count
        }


class Throughput:
    """Tokens per second of training alone, and how much of that time was waiting for rows.

    Attributes:
        tokens: seen at the last call of `since_last`, or at first.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self._since = time.perf_counter()
        self._waited = 0.0

    def since_last(self, tokens: int) -> tuple[float, float]:
        """Tokens per second, and the share of the time spent in `waiting`, since the last call.

        Args:
            tokens: seen by now.
        """
        now = time.perf_counter()
        seconds = now - self._since
        rate, share = (tokens - self.tokens) / seconds, self._waited / seconds
        self.tokens, self._since, self._waited = tokens, now, 0.0
        return rate, share

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A block that waits for rows."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A block whose time does not count."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that is too large for a float."""
    return math.inf if loss > 700 else math.exp(loss)


class Tracker(Protocol):
    """A place that records go to."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record values of a step under their stable names."""

    def close(self) -> None:
        """Finish the run's record."""


class JsonLines:
    """One JSON object a line, with its step, written at once and as a whole, or not at all.

    Opening drops the records of steps after `first_step`: a run that was killed wrote them, and will write them again.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        temporary = path.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(line for line, record in _records(path) if record["step"] <= first_step)
        temporary.replace(path)
        self._file = path.open("ab", buffering=0)

    def log(self, step: int, values: dict[str, float]) -> None:
        """See `Tracker`."""
        line = (json.dumps({"step": step, **values}) + "\n").encode()
        size = os.fstat(self._file.fileno()).st_size
        if self._file.write(line) < len(line):  # the disk is full, and readers stop at a broken line
            self._file.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        """See `Tracker`."""
        self._file.close()


def read_records(path: Path) -> list[dict[str, Any]]:
    """All records of a `metrics.jsonl`; a last line cut short by a kill is left out."""
    return [record for _, record in _records(path)]


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Lines and their records, up to the first line that is none."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        while line := file.readline(_LONGEST_RECORD):
            try:
                text = line.decode("utf-8").rstrip("\n") + "\n"
                record = json.loads(text)
                record["step"] += 0
            except (ValueError, TypeError, KeyError, RecursionError):
                return
            yield text, record


class Wandb:
    """Weights & Biases; a resumed run goes on under the same id.

    Where its server is not reached, it records offline, and `wandb sync` uploads that later.

    Raises:
        InputError: `--wandb_mode online` without a login that works.
    """

    def __init__(self, config: TrainConfig, settings: dict[str, Any]) -> None:
        import wandb  # noqa: PLC0415  slow to import, and only the main rank needs it

        id_file = config.run_dir / "wandb_id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4), encoding="utf-8")
        limits = {"init_timeout": float(os.environ.get("WANDB_INIT_TIMEOUT", "30")), "finish_timeout": 20}  # s

        def start(mode: str) -> wandb.Run:
            return wandb.init(
                project=config.wandb_project,
                entity=config.wandb_entity,
                name=config.name,
                id=id_file.read_text(encoding="utf-8").strip(),
                resume="allow" if mode == "online" else None,
                dir=config.run_dir,
                mode=mode,
                config=settings,
                settings=wandb.Settings(silent=True, **limits),
            )

        mode = _wandb_mode() if config.wandb_mode == "auto" else config.wandb_mode
        try:
            self._run = start(mode)
        except Exception as error:  # its own, of the network, of its service
            is_refused = isinstance(error, wandb.errors.AuthenticationError | wandb.errors.UsageError)
            if is_refused and config.wandb_mode == "online":
                raise InputError(
                    f"--wandb_mode online: {first_line(error)} (--wandb_mode offline needs no login)"
                ) from error
            if mode != "online":
                raise
            say(f"wandb is not reached ({first_line(error)}); recording offline, for wandb sync")
            wandb.teardown()  # or the run's id is in use
            self._run = start("offline")

    def log(self, step: int, values: dict[str, float]) -> None:
        """See `Tracker`."""
        self._run.log(values, step=step)

    def close(self) -> None:
        """See `Tracker`; gives up uploading after a while."""
        self._run.finish()


def _wandb_mode() -> str:
    """Online where the user is logged in; WANDB_MODE, where set, decides."""
    if mode := os.environ.get("WANDB_MODE"):
        if mode not in {"online", "offline", "disabled"}:
            raise InputError(f"WANDB_MODE is {mode!r}, expected online, offline or disabled")
        return mode
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    try:
        return "online" if netrc.netrc().authenticators("api.wandb.ai") else "offline"
    except (OSError, netrc.NetrcParseError):
        return "offline"


class Trackers:
    """All trackers of a run, as a context; none on ranks other than the main one.

    One that fails costs its records, not the run: its first failure is said on the screen, and it is tried again with
    the next record.
    """

    def __init__(self, config: TrainConfig, world: World, settings: dict[str, Any], first_step: int) -> None:
        self._trackers: dict[str, Tracker] = {}
        self._failed: set[str] = set()
        if not world.is_main:
            return
        self._trackers["metrics.jsonl"] = JsonLines(config.run_dir / "metrics.jsonl", first_step)
        if config.wandb_mode != "disabled":
            with self._surviving("wandb"):
                self._trackers["wandb"] = Wandb(config, settings)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Give a record to every tracker."""
        for name, tracker in self._trackers.items():
            with self._surviving(name):
                tracker.log(step, values)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for name, tracker in self._trackers.items():
            with self._surviving(name):
                tracker.close()

    @contextmanager
    def _surviving(self, name: str) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # noqa: BLE001  libraries raise what they like
            if name not in self._failed:
                say(f"{name} fails ({first_line(error) or type(error).__name__}); training goes on")
            self._failed.add(name)
