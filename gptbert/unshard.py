"""`python -m gptbert.unshard RUN --output FOLDER`: full weights from a sharded checkpoint."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from gptbert.checkpoint import manifest
from gptbert.checkpoint.folder import is_sharded, newest_in, saved_step
from gptbert.checkpoint.saved_model import read_full_weights
from gptbert.checkpoint.weights import write_weights
from gptbert.command_line import run_command
from gptbert.config import ModelConfig
from gptbert.errors import InputError
from gptbert.io.json_file import write_json
from gptbert.io.names import MODEL_CONFIG, STEP, TOKENIZER, TRAIN_CONFIG, WORDS
from gptbert.io.outputs import new_folder


@dataclass(frozen=True)
class UnshardConfig:
    """Write the weights and their average from a checkpoint of --parallel fsdp as ordinary files.

    `generate`, `fill_mask` and upstream's tools read the output. To continue training, no conversion is needed:
    --resume reads sharded checkpoints with any number of processes.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """A checkpoint's folder, or a run's for its newest checkpoint."""
    output: Path
    """Folder to write; must not exist yet."""


def write_full_weights(path: Path, output: Path) -> Path:
    """Write a sharded checkpoint's weights and their average as ordinary files, with the settings and the tokenizer.

    Args:
        path: a checkpoint's folder, or a run's for its newest checkpoint.
        output: a folder that does not exist yet; written atomically.

    Returns:
        The checkpoint's folder.

    Raises:
        InputError: the checkpoint is missing, damaged or not sharded, or the output cannot be written.
    """
    path = newest_in(path)
    if not is_sharded(path):
        raise InputError(f"{path}: has no shards, so that its weights are ordinary files already")
    config = ModelConfig.from_json(path / MODEL_CONFIG)
    with new_folder(output, "--output") as folder:
        for weights in ("model", "ema"):
            write_weights(folder / f"{weights}.safetensors", read_full_weights(path, weights, config), config)
        for name in (MODEL_CONFIG, TRAIN_CONFIG, TOKENIZER, WORDS):
            if (path / name).is_file():
                shutil.copyfile(path / name, folder / name)
        if (step := saved_step(path)) is not None:
            write_json(folder / STEP, {"step": step})
        manifest.write(folder)
    return path


def unshard(config: UnshardConfig) -> None:
    """Write the folder; see `write_full_weights`."""
    path = write_full_weights(config.checkpoint, config.output)
    print(f"wrote the weights of {path} to {config.output}")


def main() -> None:
    """Entry point."""
    run_command(UnshardConfig, unshard)


if __name__ == "__main__":
    main()
