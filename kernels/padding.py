"""Rows that all begin at multiples of 16 entries, so that kernels move words of 128 bits however long rows are."""

from torch import Tensor

PADDING = 16  # entries; Triton looks whether strides are multiples of 16, and of nothing else


def padded_length(length: int) -> int:
    """The distance between rows of `length` entries."""
    return -(-length // PADDING) * PADDING


def padded_rows(like: Tensor) -> Tensor:
    """Memory for rows [B, T] of the type and on the device of `like` [B, T]."""
    num_rows, length = like.shape
    return like.new_empty(num_rows, padded_length(length))[:, :length]
