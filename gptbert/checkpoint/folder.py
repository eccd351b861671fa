"""A run's folder and the folders of its saved models: file names, and the files that describe the model."""

import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gptbert.config import ModelConfig, TrainConfig
from gptbert.errors import InputError, listed
from gptbert.io.json_file import read_json, read_object, write_json
from gptbert.io.names import (
    CHECKPOINTS,
    MODEL_CONFIG,
    RUN_CONFIG,
    SHARDS,
    STEP,
    TOKENIZER,
    TRAIN_CONFIG,
    TRAINING_STATE,
    WORD_CHECKPOINTS,
    WORDS,
)
from gptbert.io.screen import log
from gptbert.io.torch_file import TorchFile

SETTINGS_BYTES = 1 << 20  # the largest TRAIN_CONFIG that is read


def write_settings(folder: Path, config: TrainConfig, model_config: ModelConfig) -> None:
    """Write the model's shape, the run's settings, and a copy of the tokenizer in the run's folder."""
    write_json(folder / MODEL_CONFIG, asdict(model_config))
    write_json(folder / TRAIN_CONFIG, config.to_dict())
    shutil.copyfile(config.run_dir / TOKENIZER, folder / TOKENIZER)


def read_settings(path: Path) -> dict[str, Any]:
    """The settings of the run that wrote a checkpoint.

    Raises:
        InputError: they are missing or damaged.
    """
    try:
        settings = read_json(path / TRAIN_CONFIG, SETTINGS_BYTES)
    except (OSError, ValueError) as error:
        raise InputError(f"--resume {path}: its train_config.json is missing or damaged") from error
    if not isinstance(settings, dict):
        raise InputError(f"--resume {path}: its train_config.json is not a JSON object")
    return settings


def differences(saved: ModelConfig, config: ModelConfig) -> str:
    """How a saved model's shape differs from `config`, for a message; empty if it does not."""
    here, there = asdict(config), asdict(saved)
    return ", ".join(f"{key} {there[key]} there, {here[key]} here" for key in here if here[key] != there[key])


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    folder = run_dir / CHECKPOINTS
    if not folder.is_dir():
        return []
    complete = (path for path in folder.iterdir() if step_of_name(path) is not None and path.is_dir())
    return sorted(complete, key=lambda path: step_of_name(path) or 0)


def checkpoint_dir(run_dir: Path, step: int) -> Path:
    """The folder of a run's checkpoint; `step_of_name` is the inverse."""
    return run_dir / CHECKPOINTS / f"step_{step:08d}"


def step_of_name(path: Path) -> int | None:
    """The step that a checkpoint's folder is named after; None if its name is another one."""
    match = re.fullmatch(r"step_(\d{8,})", path.name, flags=re.ASCII)
    return int(match[1]) if match else None


def list_word_checkpoints(run_dir: Path) -> list[Path]:
    """A run's checkpoints by words seen, sorted by name."""
    return sorted((run_dir / WORD_CHECKPOINTS).glob("chck_*"))


def newest_in(path: Path) -> Path:
    """The folder itself if it holds a model, or the newest checkpoint of a run or of its `checkpoints` folder.

    Raises:
        InputError: it is none of these; the newest is no checkpoint but for its name; or its models have names that do
            not say which is the newest.
    """
    if (path / MODEL_CONFIG).is_file():
        return path
    if inside := list_checkpoints(path) or (list_checkpoints(path.parent) if _is_checkpoints(path) else []):
        if (inside[-1] / MODEL_CONFIG).is_file():
            return inside[-1]
        raise InputError(
            f"{inside[-1]}: is named like the newest checkpoint, and holds no {MODEL_CONFIG}; complete it or move it "
            "away, or name another checkpoint"
        )
    folders = [folder for folder in (path / CHECKPOINTS, path) if folder.is_dir()]
    models = sorted(file.parent for folder in folders for file in folder.glob(f"*/{MODEL_CONFIG}"))
    if len(models) == 1:
        return models[0]
    if models:
        raise InputError(f"{path}: holds several models ({', '.join(model.name for model in models[:4])}); name one")
    raise InputError(f"{path}: neither a checkpoint nor a run with checkpoints{_what_it_is(path)}")


def is_for_transformers(path: Path) -> bool:
    """Whether a folder has a configuration and weights, as transformers names them."""
    weights = any(any(path.glob(pattern)) for pattern in ("*model*.safetensors*", "*model*.bin*"))
    return (path / RUN_CONFIG).is_file() and weights


def _is_checkpoints(path: Path) -> bool:
    return path.resolve().name == CHECKPOINTS and (path.parent / CHECKPOINTS).resolve() == path.resolve()


def _what_it_is(path: Path) -> str:
    """What was named instead of a folder with a model, and the way on; empty if unknown."""
    if path.is_file():
        return f" but a file; name the folder that it is in ({path.parent})"
    if not path.is_dir():
        return "; there is no such folder"
    if is_for_transformers(path):
        return " but a folder for transformers; python -m gptbert.import_hf makes one of it that is read here"
    if list_word_checkpoints(path):
        return f", but one with checkpoints by words; name one of {path / WORD_CHECKPOINTS}"
    if (path / RUN_CONFIG).is_file() and (path / TOKENIZER).is_file():
        return " (it has not saved one yet)"
    runs = sorted(file.parent.name for file in path.glob(f"*/{CHECKPOINTS}"))
    return f", but a folder of runs ({listed(runs, 4)}); name one" if runs else ""


def saved_step(path: Path) -> int | None:
    """The number of steps that a saved model was trained, by its content; None if nothing there says it."""
    try:
        for name in (WORDS, STEP):
            if (path / name).is_file():
                return _as_step(read_object(path / name).get("step"))
        return _as_step(training_state_values(path).get("step"))
    except InputError as error:
        log(f"{path}: its step is unknown ({error})")
    return None


def training_state_values(path: Path) -> dict[str, Any]:
    """A checkpoint's training state with None for each tensor; empty if it has none.

    Raises:
        InputError: the file is damaged.
    """
    if not (path / TRAINING_STATE).is_file():
        return {}
    with TorchFile(path / TRAINING_STATE) as file:
        state = file.value(build=lambda _: None)
    return state if isinstance(state, dict) else {}


def _as_step(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None


def tokenizer_of(path: Path) -> Path:
    """The tokenizer file in a saved model's folder.

    Raises:
        InputError: there is none.
    """
    if not (path / TOKENIZER).exists():
        raise InputError(f"{path}: has no {TOKENIZER}; copy the one that the model was trained with into it")
    return path / TOKENIZER


def settings_if_any(path: Path) -> dict[str, Any]:
    """The settings in a saved model's folder, whoever wrote it; empty without the file.

    Raises:
        InputError: they are damaged; names the file.
    """
    return read_object(path / TRAIN_CONFIG) if (path / TRAIN_CONFIG).is_file() else {}


def run_dir_of(checkpoint: Path) -> Path | None:
    """The folder of the run that wrote a checkpoint, if the checkpoint lies in it.

    By content: the run's config.json has the name, and the output folder or the other settings, of the checkpoint's.
    """
    run_dir = checkpoint.resolve().parent.parent
    if not (run_dir / RUN_CONFIG).is_file():
        return None
    try:
        here, there = settings_if_any(checkpoint), read_object(run_dir / RUN_CONFIG).get("train")
    except InputError as error:
        log(f"{checkpoint}: the records of {run_dir} are left out ({error})")
        return None
    if not isinstance(there, dict) or not here.get("name") or here["name"] != there.get("name"):
        return None
    if here.get("output_dir") and here["output_dir"] == there.get("output_dir"):
        return run_dir
    elsewhere = {"output_dir", "resume", "huge_pages"}
    names = (here.keys() | there.keys()) - elsewhere
    return run_dir if all(here.get(name) == there.get(name) for name in names) else None


def is_sharded(path: Path) -> bool:
    """Whether a checkpoint's tensors are stored as shards."""
    return (path / SHARDS).is_dir()
