"""Dropout whose mask is a function of a seed and of the element's index: the public operation."""

from kernels.dropout.fused import dropouts, is_fused
from kernels.dropout.op import check_seed, dropout, keep_threshold, random_words

__all__ = ["check_seed", "dropout", "dropouts", "is_fused", "keep_threshold", "random_words"]
