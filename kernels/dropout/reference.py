"""Dropout's random words by definition, in int64; overflow leaves the low 32 bits correct."""

import torch
from torch import Tensor

_WORD = 2**32


def random_words(count: int, seed: tuple[int, int]) -> Tensor:
    """The words of elements 0 … count − 1, int64 with values in the range of int32.

    Each step is h ← (h ⊕ (h ≫ r)) · c mod 2³², as in MurmurHash3's finalizer; it starts from index · 2³²/φ + seed[0],
    and seed[1] is XORed in after the first step.
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
