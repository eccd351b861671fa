"""A run's folder and the folders of its saved models: file names, and the files that describe the model."""

import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gptbert.config import ModelConfig, TrainConfig
from gptbert.errors import InputError
from gptbert.io.json_file import read_json, write_json

MODEL_CONFIG = "model_config.json"
TRAIN_CONFIG = "train_config.json"
TOKENIZER = "tokenizer.json"  # also in a run's folder
OWNER = "owner.json"  # in a run's folder while a process trains in it
TRAINING_STATE = "training_state.pt"
SHARDS = "shards"  # a sharded checkpoint's tensors
CHECKPOINTS = "checkpoints"  # a run's checkpoints
WORD_CHECKPOINTS = "words"  # those saved by words seen

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


def saved_setting(path: Path, name: str) -> Any:
    """A setting of the run that wrote a checkpoint; None if it had no such setting."""
    return read_settings(path).get(name)


def differences(saved: ModelConfig, config: ModelConfig) -> str:
    """How a saved model's shape differs from `config`, for a message; empty if it does not."""
    here, there = asdict(config), asdict(saved)
    return ", ".join(f"{key} {there[key]} there, {here[key]} here" for key in here if here[key] != there[key])


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    folder = run_dir / CHECKPOINTS
    if not folder.is_dir():
        return []
    complete = (path for path in folder.iterdir() if re.fullmatch(r"step_\d{8,}", path.name) and path.is_dir())
    return sorted(complete, key=lambda path: int(path.name.removeprefix("step_")))


def list_word_checkpoints(run_dir: Path) -> list[Path]:
    """A run's checkpoints by words seen, sorted by name."""
    return sorted((run_dir / WORD_CHECKPOINTS).glob("chck_*"))


def newest_in(path: Path) -> Path:
    """The folder itself if it is a checkpoint, or the newest checkpoint of a run.

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
    """Whether a checkpoint's tensors are stored as shards."""
    return (path / SHARDS).is_dir()
