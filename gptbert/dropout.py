"""Dropout whose mask is a function of a seed and of an entry's place: nothing to store, and the same bits everywhere.

PyTorch's own dropout on a CPU draws its numbers one after another, which takes a tenth of a training step and more.
Here a few integer operations on an entry's index give its 32 random bits; compiled code fuses them into whatever comes
before, and draws them again in the backward.
"""

import torch
from torch import Tensor, nn

SEED_WORDS = 2  # of 32 bits, for each mask


class Dropout(nn.Module):
    """Zero entries with a probability, and scale the others so that the mean stays.

    Args:
        probability: of zero, in [0, 1).
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor, seed: Tensor | None) -> Tensor:
        """Drop entries of `x` where the module trains.

        Args:
            x: of any shape, below 2³¹ entries.
            seed: [2] int32 from `random_seeds`; None switches dropout off, as eval mode does.
        """
        return dropout(x, seed if self.training else None, self.probability)

    def extra_repr(self) -> str:
        """For print(model)."""
        return f"probability={self.probability}"


def random_seeds(count: int, device: torch.device) -> Tensor:
    """[count, 2] int32: seeds of `count` masks, from PyTorch's generator of the device."""
    return torch.randint(-(2**31), 2**31, (count, SEED_WORDS), dtype=torch.int32, device=device)


def dropout(x: Tensor, seed: Tensor | None, probability: float) -> Tensor:
    """`Dropout` as a function."""
    if seed is None or probability == 0:
        return x
    limit = round(probability * 2**32) - 2**31  # of signed words
    return torch.where(random_words(x.shape, seed) >= limit, x * (1 / (1 - probability)), 0.0)


def random_words(shape: torch.Size, seed: Tensor) -> Tensor:
    """32 random bits, as int32, for each place: MurmurHash3's finalizer, with a round for the seed's second word."""
    words = torch.arange(shape.numel(), dtype=torch.int32, device=seed.device).view(shape)
    words = words * _signed(0x9E3779B1) + seed[0]
    words = (words ^ _shifted(words, 15)) * _signed(0x2C1B3C6D) ^ seed[1]
    words = (words ^ _shifted(words, 16)) * _signed(0x85EBCA6B)
    words = (words ^ _shifted(words, 13)) * _signed(0xC2B2AE35)
    return words ^ _shifted(words, 16)


def _shifted(words: Tensor, bits: int) -> Tensor:
    """To the right, with zeros from the left."""
    return (words >> bits) & (2 ** (32 - bits) - 1)


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word
