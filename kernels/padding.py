"""Row strides padded to 16 elements, for 128-bit loads and stores; row counts rounded to multiples of 64."""

from torch import Tensor

PADDING = 16  # elements; Triton specializes on divisibility by 16, and on no other number
ROWS = 64


def padded_length(length: int) -> int:
    """The stride of rows of `length` elements."""
    return -(-length // PADDING) * PADDING


def padded_rows(like: Tensor) -> Tensor:
    """Uninitialized rows [B, T] with padded strides, in the dtype and on the device of `like` [B, T]."""
    num_rows, length = like.shape
    return like.new_empty(num_rows, padded_length(length))[:, :length]


def rows_apart(like: Tensor, num_rows: int, length: int, stride: int) -> Tensor:
    """Uninitialized rows [num_rows, length] in the dtype and on the device of `like`, with zeros between rows.

    Matrix products may read past a row's end: on CPUs with AMX, oneDNN 3.12 multiplies an element there by zero if the
    row's length is odd (docs/library-faults.md), and 0 · NaN is NaN.
    """
    memory = like.new_empty(num_rows, stride)
    if stride == length:
        return memory
    memory[:, length:].zero_()
    return memory[:, :length]


def rounded_rows(count: int) -> int:
    """`count` rounded up to a multiple of ROWS, for matrix products.

    oneDNN on CPUs caches code per shape and never frees it: some megabytes for every new number of labeled rows, and
    nearly every step has a new one. GPU libraries want multiples of 16 bytes.
    """
    return -(-count // ROWS) * ROWS
