"""Sums over sharded tensors; without a group, tensors are not sharded."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup, all_reduce


def whole_norms(norms: Tensor, group: ProcessGroup | None) -> Tensor:
    """Norms of unsharded tensors from the norms of this process's shards, by one all-reduce."""
    if group is None:
        return norms
    squares = norms.square()
    all_reduce(squares, group=group)
    return squares.sqrt()


def add_up_chunks(sums: Tensor, first_chunks: Tensor, group: ProcessGroup) -> None:
    """Replace the sums of each tensor's first chunk by sums over the unsharded tensor, those of its other chunks by 0.

    Args:
        sums: [2, chunks] fp32, per chunk of this process's shards.
        first_chunks: [tensors] int64, index of each tensor's first chunk.
        group: the processes that hold the shards.
    """
    offsets = F.pad(first_chunks, (0, 1), value=sums.shape[1])
    # not index_add, whose order of additions on GPUs varies; "unsafe" skips a check of the offsets, a device sync
    totals = torch.segment_reduce(sums.T.contiguous(), "sum", offsets=offsets, axis=0, unsafe=True)  # [tensors, 2]
    all_reduce(totals, group=group)
    sums.zero_().index_copy_(1, first_chunks, totals.T)
