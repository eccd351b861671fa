"""Sums over tensors of which every process of a group holds a shard; without a group, tensors are whole."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup, all_reduce


def whole_norms(norms: Tensor, group: ProcessGroup | None) -> Tensor:
    """Norms of whole tensors, from those of this process's shards, in one all-reduce."""
    if group is None:
        return norms
    squares = norms.square()
    all_reduce(squares, group=group)
    return squares.sqrt()


def add_up_chunks(sums: Tensor, first_chunks: Tensor, group: ProcessGroup) -> None:
    """Put sums over whole tensors in the place of those of their first chunks, and zeros in that of the others.

    Args:
        sums: [2, chunks] fp32, sums over chunks of this process's shards.
        first_chunks: [tensors] int64, where each tensor's sums begin.
        group: the processes that hold the shards.
    """
    offsets = F.pad(first_chunks, (0, 1), value=sums.shape[1])
    # no index_add, which adds in any order on GPUs; "unsafe" is not to wait for the device to look at the offsets
    totals = torch.segment_reduce(sums.T.contiguous(), "sum", offsets=offsets, axis=0, unsafe=True)  # [tensors, 2]
    all_reduce(totals, group=group)
    sums.zero_().index_copy_(1, first_chunks, totals.T)
