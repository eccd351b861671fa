"""Checkpoints: complete or absent, the newest few kept, and enough in each to go on to the bit.

run folder/checkpoints/step_00001000/
    model.safetensors        weights, under the published names (upstream's tools load them)
    ema.safetensors          their moving average, likewise
    training_state.pt        optimizer, step, every rank's random state and sums, skipped steps, masking history
    model_config.json        the model's shape, as --config_file reads it
    train_config.json        the run's settings
    tokenizer.json
    manifest.json            size and digest of each of them; without it, or against it, a checkpoint is damaged

With `--parallel fsdp`, `shards/` holds weights, average and moments instead, a file of each rank (see shards.py).
"""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.tensor import DTensor

from gptbert.checkpoint import manifest
from gptbert.checkpoint.folder import MODEL_CONFIG, TOKENIZER, TRAIN_CONFIG, write_settings
from gptbert.checkpoint.shards import load_shards, save_shards
from gptbert.checkpoint.training_state import STATE_KEYS, read_training_state
from gptbert.checkpoint.weights import read_weights, shapes, write_weights
from gptbert.checkpoint.word_checkpoints import list_word_checkpoints
from gptbert.config import ModelConfig, TrainConfig
from gptbert.distributed.world import World
from gptbert.errors import InputError, first_line
from gptbert.io.files import delete, move_away, publish
from gptbert.io.json_file import read_json
from gptbert.io.screen import say
from gptbert.model import GPTBert
from gptbert.text.tokenizer import tokenizer_hash

_STATE = "training_state.pt"
_SHARDS = "shards"
_SETTINGS_BYTES = 1 << 20
_WAY_OUT = "delete its folder, and --resume auto takes the one before"


@dataclass(frozen=True)
class Checkpoint:
    """What a save holds beside configuration and tokenizer.

    Attributes:
        step: steps done, and so the next step's number; every schedule is a function of it.
        model: weights, names of `GPTBert`.
        ema: their moving average.
        optimizer: its state_dict.
        rank_states: by rank, the random state ("random") and the sums since the last record ("sums").
        skipped_steps: `SkippedSteps.counts`.
        mask_counts: `MaskHistory.counts`, or None where it is off.
        is_compiled: whether its steps were; None in checkpoints of versions that did not say.
        shards: where a sharded checkpoint that was loaded has the tensors of model, average and optimizer, which then
            are empty; see `filled`.
    """

    step: int
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Any]
    rank_states: list[dict[str, Any]]
    skipped_steps: Tensor
    mask_counts: Tensor | None
    is_compiled: bool | None = None
    shards: Path | None = None

    @property
    def is_sharded(self) -> bool:
        """Whether ranks hold parts of the tensors."""
        return any(isinstance(tensor, DTensor) for tensor in self.model.values())

    def filled(
        self, model: dict[str, Tensor], ema: dict[str, Tensor], moments: dict[int, dict[str, Tensor]]
    ) -> "Checkpoint":
        """With tensors read from `shards` into these, whole or sharded in any way; every rank must call it.

        Raises:
            InputError: files are damaged, or tensors have other shapes.
        """
        load_shards(_named(model, ema, moments), self.shards)
        state = {index: values | moments[index] for index, values in self.optimizer["state"].items()}
        return replace(self, model=model, ema=ema, optimizer=self.optimizer | {"state": state}, shards=None)


def save(checkpoint: Checkpoint, config: TrainConfig, model_config: ModelConfig, world: World) -> Path:
    """Write a checkpoint under a temporary name, fsync, rename; then delete all but the newest `keep_checkpoints`.

    Every rank must call it. The main one writes whole tensors, and each its part of sharded ones.

    Returns:
        The checkpoint's folder.

    Raises:
        InputError: the disk refuses; earlier checkpoints are untouched.
    """
    final = _folder(config.run_dir) / f"step_{checkpoint.step:08d}"
    temporary, shards = final.with_name(f".{final.name}.incomplete"), {}
    moments, rest = _moments_apart(checkpoint.optimizer)  # no moments, where they are whole
    try:
        with world.agreed(), _refusals(final):
            if world.is_main:
                _write(replace(checkpoint, optimizer=rest), temporary, config, model_config)
        if checkpoint.is_sharded:
            with world.agreed(), _refusals(final):
                tensors = _named(checkpoint.model, checkpoint.ema, moments)
                shards = save_shards(tensors, temporary / _SHARDS, world)
        with world.agreed(), _refusals(final):
            if world.is_main:
                manifest.write(temporary, {f"{_SHARDS}/{name}": entry for name, entry in shards.items()})
                publish(temporary, final)
                _delete_old(final, config)
    except InputError:
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    folder = _folder(run_dir)
    if not folder.is_dir():
        return []
    complete = (path for path in folder.iterdir() if re.fullmatch(r"step_\d{8,}", path.name) and path.is_dir())
    return sorted(complete, key=lambda path: int(path.name.removeprefix("step_")))


def find(config: TrainConfig) -> Path | None:
    """The checkpoint that `--resume` names, every byte of it checked, or None where the run starts afresh.

    With `--resume auto`, damaged checkpoints are set aside as `step_….damaged` until a good one is found, and so one
    process must do this for all.

    Raises:
        InputError: the named folder is no checkpoint, or the run's folder holds checkpoints of another history, or what
            was found is damaged.
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
    if not any((path / name).is_file() for name in (_STATE, manifest.NAME)):
        inside = list_checkpoints(path)
        if not inside:
            raise InputError(f"--resume {path}: not a checkpoint (a folder that holds {_STATE})")
        path = inside[-1]
    if left_over and (not existing or path.resolve() != existing[-1].resolve()):
        raise InputError(
            f"--resume {path} while the run {config.name!r} already has {left_over[-1].name}: give another --name to "
            "branch off there, or go on with --resume auto"
        )
    try:
        manifest.check(path)
    except InputError as error:
        raise InputError(f"--resume {path}: the checkpoint is damaged ({error}); {_WAY_OUT}") from None
    if not (path / _STATE).is_file():
        raise InputError(
            f"--resume {path}: holds weights and no run to go on with; --initial_weights starts one from them"
        )
    return path


def agree(config: TrainConfig, model_config: ModelConfig, world: World) -> tuple[Path | None, Checkpoint | None]:
    """The checkpoint that a run goes on from, and where it lies; every rank must call it.

    Raises:
        InputError: on every rank; see `find`, `load` and `check_settings`.
    """
    with world.agreed():
        path = find(config) if world.is_main else None
    path = world.all_gather(path)[0]
    with world.agreed():
        if path and not path.is_dir():
            raise InputError(f"{path}: not to be seen on every host; --output_dir must be one folder for all of them")
        checkpoint = load(path, model_config) if path else None
        if checkpoint:
            check_settings(path, config)
    return path, checkpoint


def _newest_undamaged(existing: list[Path]) -> Path | None:
    damage = ""
    for path in reversed(existing):
        try:
            manifest.check(path)
        except InputError as error:
            damage = damage or f"{path} ({error})"
            say(f"--resume auto: {path} is damaged ({error}), set aside as {path.name}.damaged")
            move_away(path, f"{path.name}.damaged")
        else:
            return path
    if damage:  # to begin anew is for the user to say
        raise InputError(f"--resume auto: no checkpoint is undamaged, the newest is {damage}; give another --name")
    return None


def saved_setting(path: Path, name: str) -> Any:
    """A setting of the run that wrote a checkpoint; None where it had no such setting."""
    return _saved_settings(path).get(name)


def changed_settings(path: Path, config: TrainConfig) -> list[str]:
    """Settings that differ from those of the run that wrote a checkpoint, where they bear on the result."""
    saved = _saved_settings(path)
    here = {name: _as_typed(value) for name, value in config.to_dict().items()}
    there = {name: _as_typed(saved.get(name)) for name in here}
    return [
        f"--{name} {there[name]} -> {here[name]}"
        for name in here
        if name not in {"resume", "output_dir", "name"} and here[name] != there[name]
    ]


def _as_typed(value: object) -> str:
    """A setting as on the command line; a list of one file is that file, as older checkpoints have it."""
    return " ".join(map(str, value)) or "None" if isinstance(value, list) else str(value)


def check_settings(path: Path, config: TrainConfig) -> None:
    """Refuse to go on from a checkpoint with what its weights and moments do not fit.

    Raises:
        InputError: the tokenizer or the optimizer is another one.
    """
    optimizer = _saved_settings(path).get("optimizer")
    if optimizer != config.optimizer:
        raise InputError(f"--optimizer {config.optimizer}, but {path} was trained with {optimizer}")
    if tokenizer_hash(path / TOKENIZER) != tokenizer_hash(config.tokenizer_path):
        raise InputError(f"--tokenizer_path {config.tokenizer_path} is not the tokenizer that {path} was trained with")


def load(path: Path, model_config: ModelConfig) -> Checkpoint:
    """Read a checkpoint onto the CPU, but for the tensors of a sharded one.

    Raises:
        InputError: something is missing or damaged, or the model has another shape than `model_config`.
    """
    saved_config = ModelConfig.from_json(path / MODEL_CONFIG)
    shards, weights = path / _SHARDS if is_sharded(path) else None, {"model": {}, "ema": {}}
    try:
        if shards is None:
            weights = {name: read_weights(path / f"{name}.safetensors", saved_config) for name in weights}
        state = read_training_state(path / _STATE, weights["model"], _saved_settings(path).get("optimizer", ""))
        checkpoint = Checkpoint(**weights, **state, shards=shards)
    except InputError as error:
        raise InputError(f"--resume {path}: the checkpoint is damaged ({error}); {_WAY_OUT}") from error
    if changes := differences(saved_config, model_config):
        raise InputError(f"--resume {path}: its model differs from --config_file: {changes}")
    return checkpoint


def load_model(path: Path, weights: str = "ema") -> GPTBert:
    """A model in eval mode with the weights of a checkpoint, on the CPU.

    Args:
        path: a checkpoint's folder, or a run's for its newest checkpoint.
        weights: "ema" or "model".

    Raises:
        InputError: nothing there, or damaged.
    """
    path = newest_in(Path(path))
    config = ModelConfig.from_json(path / MODEL_CONFIG)
    try:  # before the model takes the memory of its shape
        state = whole_weights(path, weights, config)
    except InputError as error:
        raise InputError(f"{path}: the checkpoint is damaged ({error})") from error
    model = GPTBert(config)
    model.load_state_dict(state)
    return model.eval()


def differences(saved: ModelConfig, config: ModelConfig) -> str:
    """In words, how the shape of a saved model differs from another; nothing where it does not."""
    here, there = asdict(config), asdict(saved)
    return ", ".join(f"{key} {there[key]} there, {here[key]} here" for key in here if here[key] != there[key])


def newest_in(path: Path) -> Path:
    """A checkpoint's folder itself, or the newest of a run.

    Raises:
        InputError: it is neither.
    """
    if (path / MODEL_CONFIG).is_file():
        return path
    inside = list_checkpoints(path)
    if not inside:
        raise InputError(f"{path}: neither a checkpoint nor a run with checkpoints")
    return inside[-1]


def is_sharded(path: Path) -> bool:
    """Whether a checkpoint's tensors are in the parts that ranks had."""
    return (path / _SHARDS).is_dir()


def whole_weights(path: Path, weights: str, config: ModelConfig) -> dict[str, Tensor]:
    """Whole weights of a checkpoint of either kind, checked against its manifest.

    Args:
        path: the checkpoint's folder.
        weights: "ema" or "model".
        config: its model's shape.

    Raises:
        InputError: a file's name, and what is wrong with it.
    """
    if not is_sharded(path):
        manifest.check(path, [MODEL_CONFIG, f"{weights}.safetensors"])
        return read_weights(path / f"{weights}.safetensors", config)
    manifest.check(path)
    state = {name: torch.empty(shape) for name, shape in shapes(config).items()}
    load_shards({f"{weights}.{name}": tensor for name, tensor in state.items()}, path / _SHARDS)
    return state


@contextmanager
def _refusals(final: Path) -> Iterator[None]:
    """A block whose errors of the disk say which checkpoint could not be written; libraries have their own words."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, InputError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        free = shutil.disk_usage(final.parents[1]).free / 1e6
        raise InputError(f"checkpoint {final}: cannot be written ({reason}); {free:,.1f} MB are free there") from error


def _write(checkpoint: Checkpoint, temporary: Path, config: TrainConfig, model_config: ModelConfig) -> None:
    """All files but the shards and the manifest."""
    for leftover in temporary.parent.glob(".step_*"):  # of a save or a deletion that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    state = {key: getattr(checkpoint, key) for key in STATE_KEYS}
    if checkpoint.is_sharded:
        (temporary / _SHARDS).mkdir()
    else:
        for name, weights in (("model", checkpoint.model), ("ema", checkpoint.ema)):
            write_weights(temporary / f"{name}.safetensors", weights, model_config)
    torch.save(state, temporary / _STATE)
    write_settings(temporary, config, model_config)


def _delete_old(final: Path, config: TrainConfig) -> None:
    """All but the newest `keep_checkpoints`, of which the one just written is one."""
    others = [folder for folder in list_checkpoints(config.run_dir) if folder != final]
    for folder in others[: max(0, len(others) + 1 - config.keep_checkpoints)]:
        delete(folder)


def _moments_apart(optimizer: dict[str, Any]) -> tuple[dict[int, dict[str, Tensor]], dict[str, Any]]:
    """The part of an optimizer's state that is sharded, by parameter, and its state_dict without."""
    moments = {
        index: {name: value for name, value in values.items() if isinstance(value, DTensor)}
        for index, values in optimizer["state"].items()
    }
    rest = {
        index: {name: value for name, value in values.items() if name not in moments[index]}
        for index, values in optimizer["state"].items()
    }
    return moments, optimizer | {"state": rest}


def _named(
    model: dict[str, Tensor], ema: dict[str, Tensor], moments: dict[int, dict[str, Tensor]]
) -> dict[str, Tensor]:
    """All tensors under the names that they have in the shards."""
    return {
        **{f"model.{name}": tensor for name, tensor in model.items()},
        **{f"ema.{name}": tensor for name, tensor in ema.items()},
        **{f"{name}.{index}": tensor for index, values in moments.items() for name, tensor in values.items()},
    }


def _folder(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def _saved_settings(path: Path) -> dict[str, Any]:
    try:
        settings = read_json(path / TRAIN_CONFIG, _SETTINGS_BYTES)
    except (OSError, ValueError) as error:
        raise InputError(f"--resume {path}: its train_config.json is missing or damaged") from error
    if not isinstance(settings, dict):
        raise InputError(f"--resume {path}: its train_config.json is no JSON object")
    return settings
