"""Dropout whose mask is a function of a seed and of an element's place: no mask is stored, and it is the same anywhere.

PyTorch's own dropout on a CPU draws its numbers one after another, which takes a tenth of a training step and more.
Here a few integer operations on an entry's index give its 32 random bits; compiled code fuses them into whatever comes
before, and draws them again in the backward.
"""

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B1  # 2³² by the golden ratio, odd


def dropout(x: Tensor, seed: Tensor | None, probability: float) -> Tensor:
    """Zero entries with a probability, and scale the others so that the mean stays.

    Args:
        x: of any shape, below 2³¹ entries.
        seed: [2] int32; None switches dropout off.
        probability: of zero, in [0, 1).
    """
    if seed is None or probability == 0:
        return x
    return torch.where(random_words(x.shape, seed) >= keep_threshold(probability), x * (1 / (1 - probability)), 0.0)


def keep_threshold(probability: float) -> int:
    """Threshold: an element is kept if its int32 random word is ≥ this."""
    return round(probability * 2**32) - 2**31


def random_words(shape: torch.Size, seed: Tensor) -> Tensor:
    """32 random bits, as int32, for each place: MurmurHash3's finalizer, with a round for the seed's second word."""
    words = torch.arange(shape.numel(), dtype=torch.int32, device=seed.device).view(shape)
    # index · _GOLDEN + seed[0], in an order in which Inductor does not see a product of an index and a number: it
    # would make numbers beyond 32 bits of it where it pads, which Triton refuses
    words = (words + seed[0] * _signed(pow(_GOLDEN, -1, 2**32))) * _signed(_GOLDEN)
    words = (words ^ _shifted(words, 15)) * _signed(0x2C1B3C6D) ^ seed[1]
    words = (words ^ _shifted(words, 16)) * _signed(0x85EBCA6B)
    words = (words ^ _shifted(words, 13)) * _signed(0xC2B2AE35)
    return words ^ _shifted(words, 16)


def _shifted(words: Tensor, bits: int) -> Tensor:
    """To the right, with zeros from the left."""
    return (words >> bits) & (2 ** (32 - bits) - 1)


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word
