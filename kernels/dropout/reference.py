"""Dropout's random words by their definition, in int64, whose low 32 bits are right in spite of overflow."""

import torch
from torch import Tensor

_WORD = 2**32


def random_words(count: int, seed: tuple[int, int]) -> Tensor:
    """The words of elements 0 … count − 1 in int64, signed as int32 is.

    Each step is h ← (h ⊕ (h ≫ r)) · c mod 2³² of MurmurHash3's finalizer; the first hashes index · 2³²/φ + seed[0],
    the second's input takes in seed[1].
    """
    first, second = (word % _WORD for word in seed)
    words = torch.arange(count) * 0x9E3779B1 % _WORD
    words = (words + first) % _WORD
    words = (words ^ (words >> 15)) * 0x2C1B3C6D % _WORD ^ second
    words = (words ^ (words >> 16)) * 0x85EBCA6B % _WORD
    words = (words ^ (words >> 13)) * 0xC2B2AE35 % _WORD
    words = words ^ (words >> 16)
    return torch.where(words < _WORD // 2, words, words - _WORD)


def dropout(x: Tensor, seed: tuple[int, int], probability: float) -> Tensor:
    """See `kernels.dropout`."""
    words = random_words(x.numel(), seed).view(x.shape)
    is_kept = (words + _WORD // 2) >= probability * _WORD
    return torch.where(is_kept, x / (1 - probability), 0.0)
