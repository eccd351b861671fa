"""Dropout whose mask is a function of a seed and of an element's place: the public operation."""

from kernels.dropout.op import dropout, keep_threshold, random_words

__all__ = ["dropout", "keep_threshold", "random_words"]
