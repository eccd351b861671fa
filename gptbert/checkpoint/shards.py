"""Sharded tensors on disk, by torch.distributed.checkpoint: each rank writes its parts, any number of ranks can read.

The files are safetensors with each part's offsets in the header, so reading them runs no code.
"""

import warnings
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from gptbert.checkpoint.manifest import Entry, entry
from gptbert.distributed.world import World
from gptbert.errors import InputError, first_line


def save_shards(tensors: dict[str, Tensor], folder: Path, world: World) -> dict[str, Entry]:
    """Write this rank's parts; every rank must call it.

    Args:
        tensors: DTensors by name; a part that several ranks hold is written by one of them.
        folder: empty.
        world: the processes that the tensors are sharded over.

    Returns:
        The manifest entries of all ranks' files, by name within `folder`.

    Raises:
        InputError: writing fails; on every rank.
    """
    try:
        dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:  # all ranks raise it
        raise InputError(_reason(error)) from error
    with world.errors_on_all_ranks():
        own = {path.name: entry(path) for path in folder.glob(f"shard-{world.rank + 1:05d}-*")}
    return {name: values for each in world.all_gather(own) for name, values in each.items()}


def check_shards(folder: Path) -> None:
    """Refuse a folder with a pipe or a device in it, whose reading may never end; before `load_shards`.

    Raises:
        InputError: there is one; on this rank.
    """
    if not all(path.is_file() for path in folder.iterdir()):
        raise InputError(f"{folder.name}: contains something that is not a file")


def load_shards(tensors: dict[str, Tensor], folder: Path) -> None:
    """Read into tensors, full ones or DTensors of any placement; every rank must call it.

    Raises:
        InputError: a tensor is missing or has a different shape, or a file is damaged; on every rank.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about running as a single process, as tools do
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=not dist.is_initialized())
    except CheckpointException as error:
        raise InputError(f"{folder.name}: {_reason(error)}") from error
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise InputError(f"{folder.name}: {first_line(error)[:100]}") from error


def _reason(error: CheckpointException) -> str:
    """The reason given by the first rank that failed."""
    cause, _ = error.failures[min(error.failures)]
    return (first_line(cause) or type(cause).__name__)[:200]
