"""Sharded tensors on disk, by torch.distributed.checkpoint: each rank writes its parts, any number of ranks reads them.

The files are safetensors with the place of each part in their headers, so that reading them runs nothing.
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
        tensors: by name, DTensors; where ranks hold the same part, one of them writes it.
        folder: an empty one.
        world: the processes over which the tensors are spread.

    Returns:
        By name within `folder`, what the manifest says of the files of all ranks.

    Raises:
        InputError: a disk refuses; on every rank.
    """
    try:
        dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:
        raise InputError(_reason(error)) from error
    own = {path.name: entry(path) for path in folder.glob(f"shard-{world.rank + 1:05d}-*")}
    return {name: values for each in world.all_gather(own) for name, values in each.items()}


def load_shards(tensors: dict[str, Tensor], folder: Path) -> None:
    """Read into tensors, whole ones or DTensors of any placement; every rank must call it.

    Raises:
        InputError: a tensor is missing or has another shape, or a file is damaged; on every rank.
    """
    if not all(path.is_file() for path in folder.iterdir()):  # a pipe or device may never end
        raise InputError(f"{folder.name}: holds something that is no file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about being alone, which a tool may be
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=not dist.is_initialized())
    except CheckpointException as error:
        raise InputError(f"{folder.name}: {_reason(error)}") from error
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise InputError(f"{folder.name}: {first_line(error)[:100]}") from error


def _reason(error: CheckpointException) -> str:
    """Of the first rank that failed."""
    cause, _ = error.failures[min(error.failures)]
    return (first_line(cause) or type(cause).__name__)[:200]
