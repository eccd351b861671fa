"""Destinations of a run's records: its own files, Weights & Biases, TensorBoard."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, Self

from gptbert.config import TrainConfig
from gptbert.distributed.world import World
from gptbert.errors import InputError, first_line
from gptbert.io import environment
from gptbert.io.names import METRICS, SAMPLES
from gptbert.io.screen import log
from gptbert.monitoring.records import JsonLines

_ID_FILE = "wandb_id"  # in a run's folder
_UNSET = "; unset it, or --trackers without wandb"


class Tracker(Protocol):
    """A destination of records."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Record a step's values under their stable names."""

    def close(self) -> None:
        """Finish the run's record."""


class Wandb:
    """Weights & Biases; a resumed run keeps its id.

    If the server cannot be reached, it records offline; `wandb sync` uploads that later.

    Raises:
        InputError: `--wandb_mode online` without a working login.
    """

    def __init__(self, config: TrainConfig, settings: dict[str, Any]) -> None:
        import wandb  # noqa: PLC0415  slow to import, and only the main rank needs it

        environment.drop_empty("WANDB_")
        environment.provide_home(config.run_dir)
        run_id = id_of(config.run_dir)
        limits = {"init_timeout": environment.seconds("WANDB_INIT_TIMEOUT") or 30.0, "finish_timeout": 20}  # s

        def start(mode: str) -> wandb.Run:
            return wandb.init(
                project=config.wandb_project,
                entity=config.wandb_entity,
                name=config.name,
                id=run_id,
                resume="allow" if mode == "online" else None,
                dir=config.run_dir,
                mode=mode,
                config=settings,
                settings=wandb.Settings(silent=True, **limits),
            )

        mode = _wandb_mode() if config.wandb_mode == "auto" else config.wandb_mode
        if config.wandb_mode != "auto":
            environment.choice("WANDB_MODE", ("online", "offline", "disabled"))  # wandb reads it even so
        try:
            self._run = start(mode)
        except Exception as error:  # wandb's own, the network's, the service's
            if hasattr(error, "errors"):  # pydantic's, of a setting of a wrong value
                raise InputError(f"{_named(error)}{_UNSET}") from error
            is_refused = isinstance(error, wandb.errors.AuthenticationError | wandb.errors.UsageError)
            if is_refused and config.wandb_mode == "online":
                raise InputError(
                    f"--wandb_mode online: {first_line(error)} (--wandb_mode offline needs no login)"
                ) from error
            if mode != "online":
                raise
            log(f"wandb is not reached ({first_line(error)}); recording offline, for wandb sync")
            wandb.teardown()  # otherwise the run's id stays in use
            self._run = start("offline")

    def log(self, step: int, values: dict[str, float]) -> None:
        """See `Tracker`."""
        self._run.log(values, step=step)

    def close(self) -> None:
        """See `Tracker`; stops uploading after a timeout."""
        self._run.finish()


def id_of(run_dir: Path) -> str:
    """The id of a run in wandb, which its folder keeps where it is moved; a copy of it is another run, with its own.

    The folder's wandb_id has the id, and the folder for which it was made.
    """
    file, here = run_dir / _ID_FILE, run_dir.resolve()
    run_id, home = _read_id(file)
    original = home / _ID_FILE
    if run_id and original.is_file() and not original.samefile(file) and _read_id(original)[0] == run_id:
        log(f"{run_dir} is a copy of {home}, so wandb records it as another run")
        run_id = ""
    run_id = run_id or secrets.token_hex(4)
    file.write_text(f"{run_id}\n{here}\n", encoding="utf-8")
    return run_id


def _read_id(file: Path) -> tuple[str, Path]:
    """The id, or "", and its run's folder; that of the file where it does not say one, as earlier versions wrote it."""
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    run_id, home, *_ = [*lines, "", ""]
    return run_id.strip(), Path(home) if home else file.parent


def _wandb_mode() -> str:
    """WANDB_MODE if set; else online if wandb says that the user is logged in."""
    if mode := environment.choice("WANDB_MODE", ("online", "offline", "disabled")):
        return mode
    if _is_logged_in():
        return "online"
    log("wandb records offline, since nobody is logged in (wandb login; --wandb_mode offline says that it is meant)")
    return "offline"


def _is_logged_in() -> bool:
    """Whether wandb has credentials for its server; asks no one.

    Raises:
        InputError: a variable of wandb's, such as WANDB_API_KEY or WANDB_BASE_URL, cannot be used.
    """
    import wandb  # noqa: PLC0415  as above

    try:
        wandb.setup(settings=wandb.Settings(silent=True))
        return wandb.login(prompt=False, verify=False)
    except (ValueError, wandb.errors.Error) as error:
        way_on = " (wandb login; --wandb_mode offline needs none)" if "key" in str(error).lower() else _UNSET
        raise InputError(f"{_named(error)}{way_on}") from error


def _named(error: Exception) -> str:
    """A wandb error, with the name of the variable that a wrong value comes from, or of all that are set."""
    wrong = error.errors() if hasattr(error, "errors") else []  # pydantic's
    if not wrong:
        variables = environment.names("WANDB_")
        return f"wandb: {first_line(error)}" + (f" ({', '.join(variables)} in the environment)" if variables else "")
    value = "" if "key" in str(wrong[0]["loc"]) else f" is {str(wrong[0].get('input'))[:100]!r}"
    return f"WANDB_{'_'.join(map(str, wrong[0]['loc'])).upper()}{value}: {wrong[0]['msg']}"


class TensorBoard:
    """Event files in the run's folder, for `tensorboard --logdir`.

    Records of steps after `first_step`, written by a killed run, are hidden: this run writes them again.

    Raises:
        InputError: the library is not installed.
    """

    def __init__(self, config: TrainConfig, first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  an extra
        except ImportError as error:
            raise InputError(
                f"--trackers tensorboard: {first_line(error)} (pip install tensorboard brings it)"
            ) from error
        self._writer = SummaryWriter(str(config.run_dir / "tensorboard"), purge_step=first_step + 1)

    def log(self, step: int, values: dict[str, float]) -> None:
        """See `Tracker`; flushes, since records lost in a kill would not be written again."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """See `Tracker`."""
        self._writer.close()


class Trackers:
    """All trackers of a run, as a context manager; none on ranks other than the main one.

    A failing tracker loses records but does not end the run: its first failure is logged, and it is tried again with
    the next record.
    """

    def __init__(self, config: TrainConfig, world: World, settings: dict[str, Any], first_step: int) -> None:
        self._trackers: dict[str, Tracker] = {}
        self._samples: JsonLines | None = None
        self._failed: set[str] = set()
        if not world.is_main:
            return
        self._trackers[METRICS] = JsonLines(config.run_dir / METRICS, first_step)
        self._samples = JsonLines(config.run_dir / SAMPLES, first_step)
        if "wandb" in config.trackers and config.wandb_mode != "disabled":
            with self._surviving("wandb"):
                self._trackers["wandb"] = Wandb(config, settings)
        if "tensorboard" in config.trackers:
            with self._surviving("tensorboard"):
                self._trackers["tensorboard"] = TensorBoard(config, first_step)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Give a record to every tracker."""
        for name, tracker in self._trackers.items():
            with self._surviving(name):
                tracker.log(step, values)

    def log_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Write the model's guesses for fixed texts, one line each; see `gptbert.monitoring.samples`."""
        if self._samples:
            with self._surviving(SAMPLES):
                for sample in samples:
                    self._samples.log(step, sample)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for name, tracker in self._trackers.items():
            with self._surviving(name):
                tracker.close()
        if self._samples:
            self._samples.close()

    @contextmanager
    def _surviving(self, name: str) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # noqa: BLE001  libraries may raise anything
            if name not in self._failed:
                log(f"{name} fails ({first_line(error) or type(error).__name__}); training goes on")
            self._failed.add(name)
