"""What the kernels read from the device to find their work: where tensors lie, and how they are cut into chunks."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

MIN_CHUNK = 2**14  # elements: 100 KB of traffic or more for each program
MAX_CHUNKS = 512  # of one tensor: every program of the update kernel adds up the sums of all of them

# Columns of the table of tensors. The first six are addresses.
PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, STEP, AVERAGE, SIZE, CHUNK_SIZE, FIRST_CHUNK, COLUMNS = range(10)

Addresses = tuple[tuple[int, ...], ...]  # of all parameters, of all gradients, and so on in the order of the columns


@dataclass(frozen=True)
class ChunkTable:
    """A function of addresses, sizes and decays; the tensors are on the device.

    Attributes:
        table: [tensors, COLUMNS] int64.
        owners: [chunks] int32, the tensor of each chunk.
        decays: [tensors] fp32, weight decay.
        one: fp32 scalar 1, for kernels that read a factor from the device where there is none.
        aligned: whether all tensors but the gradients begin at multiples of 16 bytes.
        grad_aligned: whether the gradients do.
    """

    table: Tensor
    owners: Tensor
    decays: Tensor
    one: Tensor
    aligned: bool
    grad_aligned: bool


_captured: list[ChunkTable] = []  # CUDA graphs read these at each replay, after the cache may have dropped them


def addresses(*columns: list[Tensor]) -> Addresses:
    """Where tensors lie, of each list that is not empty; a list of averages may be."""
    return tuple(tuple(map(Tensor.data_ptr, column)) for column in columns if column)


def find_chunk_table(
    addresses: Addresses, sizes: tuple[int, ...], decays: tuple[float, ...], device: torch.device
) -> ChunkTable:
    """The table of these tensors, without a device sync.

    Args:
        addresses: see `addresses`.
        sizes: elements of each tensor.
        decays: weight decay of each tensor.
        device: where the tables are wanted.

    Raises:
        RuntimeError: a CUDA graph is being captured, and the tables are not there yet.
    """
    tables = make_chunk_table(addresses, sizes, decays, device)
    if is_capturing(device):
        _captured.append(tables)
    return tables


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph records what happens on the current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@functools.lru_cache(maxsize=8)  # gradient addresses alternate between a few allocations
def make_chunk_table(
    addresses: Addresses, sizes: tuple[int, ...], decays: tuple[float, ...], device: torch.device
) -> ChunkTable:
    """As `find_chunk_table`, for tensors that it has not seen lately."""
    if is_capturing(device):
        raise RuntimeError(
            "lamb_step: a CUDA graph cannot record how it learns where new tensors lie; call it once with the same "
            "tensors (gradients too: zero_grad(set_to_none=False) keeps them) before the capture"
        )
    size = torch.tensor(sizes, dtype=torch.int64)
    chunk_size = torch.tensor([_chunk_size(number) for number in sizes], dtype=torch.int64)
    num_chunks = ((size + chunk_size - 1) // chunk_size).clamp(min=1)  # empty tensors grow older too
    table = torch.zeros(len(sizes), COLUMNS, dtype=torch.int64)
    table[:, : len(addresses)] = torch.tensor(addresses, dtype=torch.int64).T
    table[:, SIZE], table[:, CHUNK_SIZE] = size, chunk_size
    table[:, FIRST_CHUNK] = num_chunks.cumsum(0) - num_chunks
    owners = torch.arange(len(sizes), dtype=torch.int32).repeat_interleave(num_chunks)
    on_host = (table, owners, torch.tensor(decays, dtype=torch.float32), torch.ones(()))
    if device.type == "cuda":  # pinned, or the copy waits
        on_host = tuple(tensor.pin_memory() for tensor in on_host)
    state = [column for index, column in enumerate(addresses) if index not in {GRAD, STEP}]
    return ChunkTable(
        *(tensor.to(device, non_blocking=True) for tensor in on_host),
        aligned=all(address % 16 == 0 for column in state for address in column),
        grad_aligned=all(address % 16 == 0 for address in addresses[GRAD]),
    )


def _chunk_size(size: int) -> int:
    """The smallest power of two that cuts a tensor into few enough chunks."""
    return max(MIN_CHUNK, 1 << (-(-size // MAX_CHUNKS) - 1).bit_length())
