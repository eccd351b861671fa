"""Mixes against fp64 sums, forward and backward, at every depth."""

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.backend import triton_kernel
from kernels.depth_mix import FusedMixes, buffer, depth_mix, depth_mix_backward, reference
from kernels.depth_mix.cpp import PIECE
from kernels.numerics import Comparison, checked_dtypes, compare, compare_function, random_bf16, sum_rounding
from kernels.run import Run

_DROPOUT = 0.3


def comparisons(device: torch.device, backend: str, run: Run | None = None) -> Iterator[Comparison]:
    """Mixes and both gradients, at sizes that are not multiples of a tile.

    Args:
        device: where the Triton kernels run; the others run on the CPU.
        backend: the implementation to compare with the reference; see `kernels.backend`.
        run: check the Triton kernels only for this run's sizes; None checks several.
    """
    if backend == "triton":
        yield from _fused_kernels(device, run)
        return
    for size in (5, 3 * PIECE + 77):
        yield from _mixes(size, backend)


def _fused_kernels(device: torch.device, run: Run | None) -> Iterator[Comparison]:
    """The kernels' own list, or a run's sizes."""
    is_gpu = device.type == "cuda"  # the interpreter is slow
    if run is not None:
        size, num_mixes = run.mixes
        (dtype,) = checked_dtypes(device, run)
        yield from compare_fused(device, 300 if is_gpu else 3, size, num_mixes, dtype)
        return
    for dtype in checked_dtypes(device):
        for rows, size, num_mixes, has_dropout in triton_kernel("depth_mix").CHECKED:
            yield from compare_fused(device, rows, size, num_mixes, dtype, has_dropout=has_dropout)
        if is_gpu:
            yield from compare_fused(device, 3000, 768, 24, dtype)


def compare_fused(
    device: torch.device, rows: int, size: int, num_mixes: int, dtype: torch.dtype, *, has_dropout: bool = True
) -> Iterator[Comparison]:
    """The fused mixes of one forward, every second with a bias, and all gradients."""
    weights = [random_bf16(depth + 1, depth + 7)[:, 0].float() / depth for depth in range(1, num_mixes + 1)]
    inputs = {
        "y_0": random_bf16(rows, size, 1)[..., 0].float(),
        "out": random_bf16(num_mixes, rows, size, 2)[..., 0].to(dtype),
        "bias": random_bf16(num_mixes, size, 3)[..., 0].float(),
        "α": torch.cat(weights),
    }
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    seeds = torch.arange(2 * num_mixes, dtype=torch.int32, device=device).view(-1, 2) * 77 - 5
    lengths = [len(weight) for weight in weights]

    def arguments(
        tensors: dict[str, Tensor],
    ) -> tuple[list[Tensor], list[Tensor | None], list[Tensor], list[Tensor | None]]:
        biases = [None if depth % 2 else bias for depth, bias in enumerate(tensors["bias"])]
        return (
            list(tensors["out"]),
            biases,
            list(tensors["α"].split(lengths)),
            list(seeds) if has_dropout else ([None] * num_mixes),
        )

    def fused(**tensors: Tensor) -> Tensor:
        outputs, biases, alphas, own_seeds = arguments(tensors)
        mixes = FusedMixes(alphas, dtype, _DROPOUT if has_dropout else 0.0, 1e-5)
        x, h = mixes.start(tensors["y_0"])
        normalized = [h]
        for output, bias, seed in zip(outputs, biases, own_seeds, strict=True):
            x, h = mixes.mix(output, bias, x, seed)
            normalized.append(h)
        return _joined(x, normalized)

    def by_definition(**tensors: Tensor) -> Tensor:
        is_exact = tensors["y_0"].dtype == torch.float64
        kept_in = torch.float64 if is_exact else dtype
        return _joined(
            *reference.fused_mixes(tensors["y_0"], *arguments(tensors), _DROPOUT if has_dropout else 0.0, 1e-5, kept_in)
        )

    name = f"fused {str(dtype).removeprefix('torch.')} R={rows} D={size} M={num_mixes}"
    yield from compare_function(f"{name}{' dropout' if has_dropout else ''}", fused, by_definition, inputs)


def _joined(x: Tensor, normalized: list[Tensor]) -> Tensor:
    """x_M and all h_n, [M + 2, R, D]."""
    return torch.stack([x, *(each.to(x.dtype) for each in normalized)])


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
