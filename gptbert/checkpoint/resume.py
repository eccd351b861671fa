"""`--resume`: the checkpoint to resume from, and the settings that must match it."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from gptbert import schedules
from gptbert.checkpoint import manifest
from gptbert.checkpoint.checkpoint import WAY_OUT, Checkpoint, load
from gptbert.checkpoint.folder import list_checkpoints, list_word_checkpoints, read_settings
from gptbert.config import ModelConfig, TrainConfig
from gptbert.data.hybrid_plan import HybridPlan
from gptbert.data.inputs import Inputs
from gptbert.data.packing import Position
from gptbert.data.progress import CorpusProgress, Progress, fresh_state
from gptbert.data.token_store import TokenStore
from gptbert.distributed.world import World
from gptbert.errors import InputError
from gptbert.io.files import move_away
from gptbert.io.names import MANIFEST, TOKENIZER, TRAINING_STATE
from gptbert.io.screen import log
from gptbert.model.objective import Objective
from gptbert.text.tokenizer import tokenizer_hash

# settings that determine what a run is trained on
_OF_DATA = (
    "train_path", "train_weights", "hybrid_numerator", "hybrid_denominator", "seq_length", "seq_length_growth",
    "global_batch_size", "batch_reduction", "max_steps", "seed",
)  # fmt: skip
_OF_SCHEDULES = (
    "learning_rate", "warmup_proportion", "cooldown_proportion", "schedule", "max_steps", "mask_p_start", "mask_p_end",
    "seq_length", "seq_length_growth", "global_batch_size", "batch_reduction",
)  # fmt: skip
_NOTABLE = 0.01  # of a schedule's value
_NOTES = {"seed": " (in the rest of this epoch some documents repeat and others are left out: it is another shuffle)"}
_NOT_OF_THE_RESULT = {
    "resume",
    "branch_from",
    "output_dir",
    "name",
    "huge_pages",
    "save_steps",
    "pairs_path",
    "score_every",
    "keep_best",
}  # settings that change nothing in it


def find_for_all_ranks(
    config: TrainConfig, model_config: ModelConfig, world: World
) -> tuple[Path | None, Checkpoint | None]:
    """The path of the checkpoint to resume from, and the checkpoint; every rank must call it.

    Raises:
        InputError: on every rank; see `find`, `load` and `check_settings`.
    """
    path = world.on_main(find, config)
    with world.errors_on_all_ranks():
        if path and not path.is_dir():
            raise InputError(f"{path}: not to be seen on every host; --output_dir must be one folder for all of them")
        checkpoint = load(path, model_config) if path else None
        if checkpoint:
            check_settings(path, config)
    return path, checkpoint


def find(config: TrainConfig) -> Path | None:
    """The checkpoint that `--resume` names, fully verified, or None if the run starts from scratch.

    With `--resume auto`, damaged checkpoints are renamed to `step_….damaged` until a good one is found; therefore only
    one process may call it.

    Raises:
        InputError: the named folder is not a checkpoint, the run's folder has checkpoints of a different history, or
            the checkpoint found is damaged.
    """
    existing = list_checkpoints(config.run_dir)
    left_over = existing or list_word_checkpoints(config.run_dir)
    if config.resume is None:
        if left_over:
            raise InputError(
                f"--output_dir and --name: {config.run_dir} already holds checkpoints; go on with --resume auto (given "
                "from the first start on where something restarts the run, as torchrun --max_restarts does), or give "
                "another --name"
            )
        return None
    if config.resume == "auto":
        return _newest_undamaged(existing)
    path = Path(config.resume)
    asked = f"--resume {path}" if config.branch_from is None else f"--branch_from {config.branch_from}"
    if not any((path / name).is_file() for name in (TRAINING_STATE, MANIFEST)):
        inside = list_checkpoints(path)
        if not inside:
            raise InputError(f"{asked}: not a checkpoint (a folder that holds {TRAINING_STATE})")
        path = inside[-1]
    if left_over and (not existing or path.resolve() != existing[-1].resolve()):
        raise InputError(
            f"{asked} while the run {config.name!r} already has {left_over[-1].name}: give another --name to "
            "branch off there, or go on with --resume auto"
        )
    try:
        manifest.check(path)
    except InputError as error:
        raise InputError(f"{asked}: the checkpoint is damaged ({error}); {WAY_OUT}") from None
    if not (path / TRAINING_STATE).is_file():
        raise InputError(f"{asked}: holds weights and no run to go on with; --initial_weights starts one from them")
    return path


def _newest_undamaged(existing: list[Path]) -> Path | None:
    damage = ""
    for path in reversed(existing):
        try:
            manifest.check(path)
        except InputError as error:
            damage = damage or f"{path} ({error})"
            log(f"--resume auto: {path} is damaged ({error}), set aside as {path.name}.damaged")
            move_away(path, f"{path.name}.damaged")
        else:
            return path
    if damage:  # starting over is the user's decision
        raise InputError(f"--resume auto: no checkpoint is undamaged, the newest is {damage}; give another --name")
    return None


def check_settings(path: Path, config: TrainConfig) -> None:
    """Refuse to resume with settings that do not fit a checkpoint's weights and moments.

    Raises:
        InputError: the tokenizer or the optimizer is a different one.
    """
    optimizer = read_settings(path).get("optimizer")
    if optimizer != config.optimizer:
        raise InputError(f"--optimizer {config.optimizer}, but {path} was trained with {optimizer}")
    if tokenizer_hash(path / TOKENIZER) != tokenizer_hash(config.tokenizer_path):
        raise InputError(f"--tokenizer_path {config.tokenizer_path} is not the tokenizer that {path} was trained with")


def changed_settings(path: Path, config: TrainConfig) -> list[str]:
    """Settings that affect the result and differ from those of the run that wrote a checkpoint."""
    saved = read_settings(path)
    here = {name: _as_typed(value) for name, value in config.to_dict().items()}
    there = {name: _as_typed(saved.get(name)) for name in here}
    return [
        f"--{name} {there[name]} -> {here[name]}{_NOTES.get(name, '')}"
        for name in here
        if name not in _NOT_OF_THE_RESULT and here[name] != there[name]
    ]


def changed_schedules(path: Path, step: int, config: TrainConfig) -> str:
    """What other settings than a checkpoint's do at once to the schedules, for the log; empty if nothing.

    A run that is made longer after its end, say, goes on with the learning rate of its middle.
    """
    saved = read_settings(path)
    try:
        then = replace(config, save_steps=(), **{name: saved[name] for name in _OF_SCHEDULES})
        before, now = schedules.values(then, step), schedules.values(config, step)
    except (KeyError, TypeError, ValueError, InputError, ArithmeticError):  # of an earlier version, or damaged
        return ""
    jumps = [
        f"{name} {now[name]:.3g} instead of {before[name]:.3g}"
        for name in now
        if not math.isclose(now[name], before[name], rel_tol=_NOTABLE)
    ]
    return f"so that from here on: {', '.join(jumps)}" if jumps else ""


def progress_state(path: Path, resumed: Checkpoint, config: TrainConfig, inputs: Inputs) -> tuple[dict[str, Any], str]:
    """What a checkpoint's run was trained on, and a note on it for the log, or "".

    Checkpoints of earlier versions do not have it: it is computed from their settings, as if those had always been the
    same.
    """
    if resumed.progress is not None:
        return resumed.progress, ""
    note = f"{path} was written by an earlier version, without counts"
    try:
        then = _settings_of_data(path, config)
        plan = HybridPlan(then, 1)
        slots = [plan.slots_before(objective, resumed.step) for objective in Objective]
        state = fresh_state() | {"tokens": plan.tokens_before(resumed.step), "slots": slots}
    except (InputError, TypeError, ValueError, IndexError):
        return _without_corpora(fresh_state()), f"{note}: tokens and words are counted from here on"
    try:
        stores = tuple(map(TokenStore.open, then.train_path))
    except InputError as error:
        return _without_corpora(state), f"{note}: each corpus begins anew, and words are not known ({error})"
    state = Progress(then, replace(inputs, train_stores=stores), plan).state_dict(resumed.step)
    return state, f"{note}: they are computed from its settings, as if those had always been the same"


def _without_corpora(state: dict[str, Any]) -> dict[str, Any]:
    """The state with a corpus of unknown words, so that words are not counted."""
    unknown = CorpusProgress("unknown", (), 1, None, (Position(1, 0),) * len(Objective))
    return state | {"corpora": [unknown.to_state()]}


def _settings_of_data(path: Path, config: TrainConfig) -> TrainConfig:
    """This run's settings, but those of a checkpoint where they determine what it was trained on."""
    saved = read_settings(path)
    settings: dict[str, Any] = {name: saved.get(name, getattr(TrainConfig, name, None)) for name in _OF_DATA}
    files = [settings["train_path"]] if isinstance(settings["train_path"], str) else settings["train_path"]
    settings |= {"train_path": tuple(map(Path, files)), "train_weights": tuple(settings["train_weights"])}
    return replace(config, **settings, hybrid_mode="batch", checkpoint_words=())


def _as_typed(value: object) -> str:
    """A setting as on the command line; a list of one file is that file, as in older checkpoints."""
    return " ".join(map(str, value)) or "None" if isinstance(value, list) else str(value)
