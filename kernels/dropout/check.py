"""Dropout against the definition of its random words, bit for bit."""

from collections.abc import Iterator

import torch

from kernels.dropout import dropout, random_words, reference
from kernels.numerics import Comparison, compare_exactly
from kernels.run import Run

_SEEDS = ((0, 0), (77, -5), (-(2**31), 2**31 - 1))


def comparisons(device: torch.device, backend: str, run: Run | None = None) -> Iterator[Comparison]:
    """Random words and kept elements for several seeds."""
    del backend, run
    x = torch.arange(1.0, 1000.0)
    for seed in _SEEDS:
        on_device = torch.tensor(seed, dtype=torch.int32, device=device)
        words = random_words(x.shape, on_device)
        expected = reference.random_words(x.numel(), seed).to(device, torch.int32)
        yield compare_exactly(f"words of seed {seed}", words, expected)
        for probability in (0.1, 0.5):
            kept = dropout(x.to(device), on_device, probability) != 0
            expected = reference.dropout(x, seed, probability).to(device) != 0
            yield compare_exactly(f"kept of seed {seed}, p={probability}", kept, expected)
