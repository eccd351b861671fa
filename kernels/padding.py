"""Sizes: rows that begin at multiples of 16, so that kernels move words of 128 bits; numbers of rows that recur."""

from torch import Tensor

PADDING = 16  # entries; Triton looks whether strides are multiples of 16, and of nothing else
ROWS = 64


def padded_length(length: int) -> int:
    """The distance between rows of `length` entries."""
    return -(-length // PADDING) * PADDING


def padded_rows(like: Tensor) -> Tensor:
    """Memory for rows [B, T] of the type and on the device of `like` [B, T]."""
    num_rows, length = like.shape
    return like.new_empty(num_rows, padded_length(length))[:, :length]


def rows_apart(like: Tensor, num_rows: int, length: int, stride: int) -> Tensor:
    """Memory for rows [num_rows, length] of the type and on the device of `like`, with zeros between them.

    Matrix products may read what stands behind a row: on CPUs with AMX, oneDNN 3.12 multiplies an entry of it by zero
    where the row's length is odd (docs/library-faults.md), and zero times what is not a number is not a number.
    """
    memory = like.new_empty(num_rows, stride)
    if stride == length:
        return memory
    memory[:, length:].zero_()
    return memory[:, :length]


def rounded_rows(count: int) -> int:
    """A number of rows that recurs, at least `count`, for matrix products.

    A CPU's library keeps code for each shape that it meets, and never gives up the memory: some megabytes for every new
    number of labeled rows, of which there is one in nearly every step. A GPU's wants multiples of 16 bytes.
    """
    return -(-count // ROWS) * ROWS
