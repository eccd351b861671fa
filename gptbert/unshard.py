"""`python -m gptbert.unshard RUN --output FOLDER`: ordinary weights out of a sharded checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from gptbert.checkpoint import write_whole_weights
from gptbert.command_line import run_command


@dataclass(frozen=True)
class UnshardConfig:
    """Write the weights and their average of a checkpoint of --parallel fsdp as ordinary files.

    The output has what `generate`, `fill_mask` and upstream's tools read. To train on, no conversion is needed:
    --resume takes sharded checkpoints with any number of processes.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """A checkpoint's folder, or a run's for its newest checkpoint."""
    output: Path
    """Folder to write, which must not be there yet."""


def unshard(config: UnshardConfig) -> None:
    """Write the folder; see `write_whole_weights`."""
    path = write_whole_weights(config.checkpoint, config.output)
    print(f"wrote the weights of {path} to {config.output}")


if __name__ == "__main__":
    run_command(UnshardConfig, unshard)
