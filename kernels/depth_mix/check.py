"""Mixes against fp64 sums, forward and backward, at every depth."""

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.depth_mix import buffer, depth_mix, depth_mix_backward, reference
from kernels.depth_mix.cpp import PIECE
from kernels.numerics import Comparison, compare, random_bf16, sum_rounding
from kernels.run import Run


def comparisons(device: torch.device, backend: str, run: Run | None = None) -> Iterator[Comparison]:
    """Mixes and both gradients, at sizes that are not multiples of a tile; always on the CPU."""
    del device, run
    for size in (5, 3 * PIECE + 77):
        yield from _mixes(size, backend)


def _mixes(size: int, backend: str) -> Iterator[Comparison]:
    """Four representations, forward and backward. The reference gets older ones as the buffer rounds them (bf16)."""
    count, name = 4, f"N={size}"
    y = [random_bf16(size, m + 2).float().sum(1) for m in range(count)]  # not exact in bf16
    alphas = random_bf16(count, count + 1)[:, :count].float().tril().contiguous()
    with torch.autocast("cpu", torch.bfloat16):
        values = buffer(count, y[0], backend=backend).fill_(torch.nan)
    old = [values_of.to(values.dtype).double() for values_of in y]
    for n in range(count):
        expected = reference.depth_mix([*old[:n], y[n].double()], alphas[n, : n + 1].double())
        mixed = depth_mix(values, y[n], alphas[n, : n + 1])
        yield from compare(f"{name}: x_{n}", mixed, expected, expected.float())
    grads: dict[int, Tensor] = {}
    for n in reversed(range(count)):
        grad = random_bf16(size, 9 + n).float()[:, 0]
        later = sum(alphas[k, n].double() * grads[k].to(values.dtype).double() for k in grads)
        expected = alphas[n, n].double() * grad.double() + later
        terms = torch.stack([old[m] * grad.double() for m in range(n + 1)])
        plain = torch.stack([old[m].float() @ grad for m in range(n + 1)])
        of_newest, of_alpha = depth_mix_backward(values, grad, alphas, n, count)
        yield from compare(f"{name}: ∂y_{n}", of_newest, expected, expected.float())
        yield from compare(f"{name}: ∂α_{n}", of_alpha, terms.sum(-1), plain, rounding=sum_rounding(terms))
        grads[n] = grad
