"""Dropout whose mask is a function of a seed and of the element's index: not stored, and the same on every device.

PyTorch's dropout on a CPU generates numbers sequentially, which takes a tenth of a training step or more. Here a few
integer operations on an element's index give its 32 random bits; compiled code fuses them into the preceding operation,
and computes them again in the backward.
"""

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B1  # 2³² / golden ratio, odd


def dropout(x: Tensor, seed: Tensor | None, probability: float) -> Tensor:
    """Zero elements with a probability, and scale the others so that the expectation is unchanged.

    Args:
        x: any shape, fewer than 2³¹ elements.
        seed: [2] int32; None disables dropout.
        probability: of a zero, in [0, 1).

    Raises:
        ValueError: the seed or the probability is another one.
    """
    if seed is None or probability == 0:
        return x
    check_seed(seed)
    return torch.where(random_words(x.shape, seed) >= keep_threshold(probability), x * (1 / (1 - probability)), 0.0)


def keep_threshold(probability: float) -> int:
    """Threshold: an element is kept if its int32 random word is ≥ this.

    Raises:
        ValueError: the probability is not in [0, 1).
    """
    if not 0 <= probability < 1:
        raise ValueError(f"probability of dropout: {probability} is not in [0, 1)")
    return min(round(probability * 2**32) - 2**31, 2**31 - 1)


def check_seed(seed: Tensor) -> None:
    """Raise ValueError if a kernel would read something else than two numbers of 32 bits."""
    if seed.dtype != torch.int32 or seed.shape != (2,):
        raise ValueError(f"seed: {seed.dtype} {list(seed.shape)}; expected int32 [2]")


def random_words(shape: torch.Size, seed: Tensor) -> Tensor:
    """Random int32 words, one per element's index: MurmurHash3's finalizer, and a round for the seed's second word."""
    words = torch.arange(shape.numel(), dtype=torch.int32, device=seed.device).view(shape)
    # index · _GOLDEN + seed[0], reordered to hide the product of an index and a constant from Inductor: where it pads,
    # it would fold it to constants beyond 32 bits, which Triton rejects
    words = (words + seed[0] * _signed(pow(_GOLDEN, -1, 2**32))) * _signed(_GOLDEN)
    words = (words ^ _shifted(words, 15)) * _signed(0x2C1B3C6D) ^ seed[1]
    words = (words ^ _shifted(words, 16)) * _signed(0x85EBCA6B)
    words = (words ^ _shifted(words, 13)) * _signed(0xC2B2AE35)
    return words ^ _shifted(words, 16)


def _shifted(words: Tensor, bits: int) -> Tensor:
    """Logical shift to the right."""
    return (words >> bits) & (2 ** (32 - bits) - 1)


def _signed(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word
