"""Dropout against the definition of its random words, bit for bit."""

from collections.abc import Iterator

import torch

from kernels.dropout import dropout, dropouts, random_words, reference
from kernels.numerics import Comparison, checked_dtypes, compare_exactly
from kernels.run import Run

_SEEDS = ((0, 0), (77, -5), (-(2**31), 2**31 - 1))


def comparisons(device: torch.device, backend: str, run: Run | None = None) -> Iterator[Comparison]:
    """Random words and kept elements for several seeds.

    Args:
        device: where they are drawn.
        backend: the implementation to compare with the reference; see `kernels.backend`.
        run: check the Triton kernels only in this run's dtype; None checks all.
    """
    if backend == "triton":
        for dtype in checked_dtypes(device, run):
            for probability in (0.1, 0.3, 0.5):
                yield from compare_dropouts(device, dtype, probability)
        return
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


def compare_dropouts(device: torch.device, dtype: torch.dtype, probability: float = 0.3) -> Iterator[Comparison]:
    """Three masks of one tensor, and the gradients that come back through them; two blocks, the second not whole."""
    x = (torch.arange(1.0, 1521.0) / 64).view(19, 80).to(device).requires_grad_()
    places = torch.tensor(_SEEDS, dtype=torch.int32, device=device).repeat_interleave(2, dim=0)[::2]  # rows apart
    dropped = dropouts(x, places, probability, dtype)
    grad = torch.randn(dropped.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    dropped.backward(grad)
    kept = torch.stack([reference.dropout(torch.ones(19, 80), seed, probability) for seed in _SEEDS]).to(device)
    scale = torch.tensor(1 / (1 - probability), dtype=torch.float32, device=device)
    name = f"{str(dtype).removeprefix('torch.')}, p={probability}"
    yield compare_exactly(f"masks, {name}", dropped, torch.where(kept > 0, x.detach() * scale, 0.0).to(dtype))
    parts = torch.where(kept > 0, grad.float() * scale, 0.0)
    yield compare_exactly(f"∂x, {name}", x.grad, parts[0] + parts[1] + parts[2])
