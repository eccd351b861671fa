"""A folder with a model: weights, their average, its shape, the run's settings, the tokenizer, and a manifest of them.

A checkpoint is such a folder with what a run needs to go on; `gptbert.unshard` and `gptbert.word_checkpoints` write
folders without that. All of them appear complete or not at all.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from gptbert import manifest
from gptbert.config import ModelConfig, TrainConfig
from gptbert.errors import InputError, first_line
from gptbert.files import finish, finish_folder


@contextmanager
def staged_folder(final: Path) -> Iterator[Path]:
    """Give a folder to write to, which takes its place with a manifest when the block ends well.

    After an exception nothing is left, and what was there before is untouched. A kill leaves nothing that looks
    complete, and the next folder of that name clears it away.
    """
    temporary, deleted = (final.with_name(f".{final.name}.{state}") for state in ("incomplete", "deleted"))
    try:
        for leftover in (temporary, deleted):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        manifest.write(temporary)
        publish(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish(temporary: Path, final: Path) -> None:
    """Put a complete folder in the place of whatever has its name, for good."""
    finish_folder(temporary)
    if final.exists():
        delete(final)
    temporary.rename(final)
    finish(final.parent)


def delete(folder: Path) -> None:
    """Delete a folder so that a kill half-way leaves nothing that looks complete."""
    shutil.rmtree(move_away(folder, f".{folder.name}.deleted"))


def move_away(folder: Path, name: str) -> Path:
    """Rename a folder, in place of what had that name."""
    there = folder.with_name(name)
    if there.exists():
        shutil.rmtree(there)
    return folder.rename(there)


def write_settings(folder: Path, config: TrainConfig, model_config: ModelConfig) -> None:
    """Write the model's shape, the run's settings, and the tokenizer that the run's folder holds."""
    write_json(folder / "model_config.json", asdict(model_config))
    write_json(folder / "train_config.json", config.to_dict())
    shutil.copyfile(config.run_dir / "tokenizer.json", folder / "tokenizer.json")


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write an object as people can read it."""
    path.write_text(json.dumps(values, indent=4) + "\n", encoding="utf-8")


@contextmanager
def refusals(final: Path) -> Iterator[None]:
    """A block whose errors of the disk say which checkpoint could not be written; libraries have their own words.

    Args:
        final: the checkpoint, two levels inside a folder that is there.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, InputError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        free = shutil.disk_usage(final.parents[1]).free / 1e6
        raise InputError(f"checkpoint {final}: cannot be written ({reason}); {free:,.1f} MB are free there") from error
