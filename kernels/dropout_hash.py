"""Dropout's mask for kernels that draw it themselves: the hash of `kernels/dropout/reference.py` in Triton."""

import triton
import triton.language as tl
from torch import Tensor

from kernels.dropout import keep_threshold


def keep_arguments(seed: Tensor | None, dropout_prob: float) -> tuple[int, float]:
    """A kernel's `keep_threshold` and the factor of what is kept; without a seed nothing is dropped."""
    probability = 0.0 if seed is None else dropout_prob
    return keep_threshold(probability), 1 / (1 - probability)


@triton.jit
def first_words(index, seed_ptr):
    """The part of the hash's first step that is a sum over an index's summands: index · 2³²/φ + seed[0], in uint32."""
    return index.to(tl.uint32) * 0x9E3779B1 + tl.load(seed_ptr).to(tl.uint32, bitcast=True)


@triton.jit
def keep_mask(words, seed_ptr, keep_threshold):
    """Which elements are kept, bool in the shape of their `first_words`.

    Args:
        words: `first_words` of their indices.
        seed_ptr: [2] int32.
        keep_threshold: int32, see `kernels.dropout.keep_threshold`.
    """
    second_word = tl.load(seed_ptr + 1).to(tl.uint32, bitcast=True)
    words = ((words ^ (words >> 15)) * 0x2C1B3C6D) ^ second_word
    words = (words ^ (words >> 16)) * 0x85EBCA6B
    words = (words ^ (words >> 13)) * 0xC2B2AE35
    words = words ^ (words >> 16)
    return words.to(tl.int32, bitcast=True) >= keep_threshold


@triton.jit
def outer_keep_mask(row_words, column_index, seed_ptr, keep_threshold):
    """`keep_mask` [M, N] of elements whose index is a sum, row's plus column's.

    Args:
        row_words: [M], `first_words` of the rows' summands.
        column_index: [N] integers, the columns' summands.
        seed_ptr: [2] int32.
        keep_threshold: see `keep_mask`.
    """
    words = row_words[:, None] + (column_index.to(tl.uint32) * 0x9E3779B1)[None, :]
    return keep_mask(words, seed_ptr, keep_threshold)
