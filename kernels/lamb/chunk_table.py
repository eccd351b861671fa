"""Tables on the device by which the kernels find their work: tensor addresses, and their division into chunks."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MIN_CHUNK = 2**14  # elements: at least 100 KB of traffic per program
MAX_CHUNKS = 512  # per tensor: every program of the update kernel adds the sums of all of them

# Columns of the table of tensors; the first seven are addresses.
PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, STEP, AVERAGE, COPY, SIZE, CHUNK_SIZE, FIRST_CHUNK, COLUMNS = range(11)

Addresses = tuple[tuple[int, ...], ...]  # per column, in order: of all parameters, of all gradients, …


@dataclass(frozen=True)
class ChunkTable:
    """Tables for given addresses, sizes and decays, on the device.

    Attributes:
        table: [tensors, COLUMNS] int64.
        owners: [chunks] int32, index of each chunk's tensor.
        decays: [tensors] fp32, weight decay.
        one: fp32 scalar 1, for kernels that load a factor if there is none.
        aligned: whether all tensors except gradients are 16-byte aligned.
        grad_aligned: whether the gradients are.
    """

    table: Tensor
    owners: Tensor
    decays: Tensor
    one: Tensor
    aligned: bool
    grad_aligned: bool


_captured: list[ChunkTable] = []  # kept alive: CUDA graphs read them at each replay


def addresses(*columns: Sequence[Tensor | None]) -> Addresses:
    """Addresses of the tensors of each list; 0 for None, and where a list is empty, as of averages or copies."""
    none = (0,) * len(columns[0])
    return tuple(
        tuple([0 if tensor is None else tensor.data_ptr() for tensor in column]) if column else none
        for column in columns
    )


def find_chunk_table(
    addresses: Addresses, sizes: tuple[int, ...], decays: tuple[float, ...], device: torch.device
) -> ChunkTable:
    """The table of these tensors, without a device sync.

    Args:
        addresses: see `addresses`.
        sizes: elements of each tensor.
        decays: weight decay of each tensor.
        device: of the tables.

    Raises:
        RuntimeError: a CUDA graph is being captured, and the tables are not cached.
    """
    tables = make_chunk_table(addresses, sizes, decays, device)
    if is_capturing(device):
        _captured.append(tables)
    return tables


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@functools.lru_cache(maxsize=8)  # gradient addresses alternate between a few allocations
def make_chunk_table(
    addresses: Addresses, sizes: tuple[int, ...], decays: tuple[float, ...], device: torch.device
) -> ChunkTable:
    """As `find_chunk_table`, for tensors that are not cached."""
    if is_capturing(device):
        raise RuntimeError(
            "lamb_step: a CUDA graph cannot record how it learns where new tensors lie; call it once with the same "
            "tensors (gradients too: zero_grad(set_to_none=False) keeps them) before the capture"
        )
    with torch.device("cpu"):  # whatever torch.set_default_device says
        size = torch.tensor(sizes, dtype=torch.int64)
        chunk_size = torch.tensor([_chunk_size(number) for number in sizes], dtype=torch.int64)
        num_chunks = ((size + chunk_size - 1) // chunk_size).clamp(min=1)  # empty ones too, to advance their step
        table = torch.zeros(len(sizes), COLUMNS, dtype=torch.int64)
        table[:, : len(addresses)] = torch.tensor(addresses, dtype=torch.int64).T
        table[:, SIZE], table[:, CHUNK_SIZE] = size, chunk_size
        table[:, FIRST_CHUNK] = num_chunks.cumsum(0) - num_chunks
        owners = torch.arange(len(sizes), dtype=torch.int32).repeat_interleave(num_chunks)
        numbers = (torch.tensor(each, dtype=torch.float32) for each in (decays, 1))
        on_host = [table, owners, *numbers]
    if device.type == "cuda":  # pinned, or the copy would block
        on_host = [tensor.pin_memory() for tensor in on_host]
    state = [column for index, column in enumerate(addresses) if index not in {GRAD, STEP}]
    table, owners, decay, one = (tensor.to(device, non_blocking=True) for tensor in on_host)
    return ChunkTable(
        table,
        owners,
        decay,
        one,
        aligned=all(address % 16 == 0 for column in state for address in column),
        grad_aligned=all(address % 16 == 0 for address in addresses[GRAD]),
    )


def _chunk_size(size: int) -> int:
    """The smallest power of two ≥ MIN_CHUNK that gives at most MAX_CHUNKS chunks."""
    return max(MIN_CHUNK, 1 << (-(-size // MAX_CHUNKS) - 1).bit_length())
