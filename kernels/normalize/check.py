"""LayerNorm before a product against PyTorch's LayerNorm."""

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.backend import triton_kernel
from kernels.normalize import activate, embed, fused, normalize, reference
from kernels.numerics import Comparison, checked_dtypes, compare, compare_function, random_bf16
from kernels.run import Run

_EPS = 1e-5


def comparisons(device: torch.device, backend: str, run: Run | None = None) -> Iterator[Comparison]:
    """Under autocast to bf16 and without, forward and backward; the mean is large, where E[x²] − E[x]² fails.

    Args:
        device: where it runs.
        backend: the implementation to compare with the reference; see `kernels.backend`.
        run: check the Triton kernels only for this run's sizes; None checks several.
    """
    if backend == "triton":
        yield from _fused_kernels(device, run)
        return
    x = 3 * torch.randn(7, 100, generator=torch.Generator().manual_seed(1)) + 100

    def under_autocast(x: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return normalize(x, _EPS)

    def exact(x: Tensor) -> Tensor:
        return reference.normalize(x, _EPS)

    yield from compare_function("fp32", lambda x: normalize(x, _EPS), exact, {"x": x.to(device)})
    # bf16, because the backward reads the rounded result
    yield from compare_function("autocast", under_autocast, exact, {"x": x.to(device, torch.bfloat16)})


def _fused_kernels(device: torch.device, run: Run | None) -> Iterator[Comparison]:
    """The kernels' own list, or a run's size: the embedding in fp32, the head in the run's dtype."""
    is_gpu = device.type == "cuda"  # the interpreter is slow
    if run is not None:
        rows = 300 if is_gpu else 3
        yield from compare_embedding(device, rows, run.norms)
        yield from compare_table(device, 3000 if is_gpu else rows, run.norms)
        yield from compare_activation(device, rows, run.norms, *checked_dtypes(device, run))
        return
    for rows, size, gathers, has_dropout in triton_kernel("normalize").CHECKED:
        if gathers:
            yield from compare_embedding(device, rows, size, has_dropout=has_dropout)
            yield from compare_table(device, 3000 if is_gpu else 150, size)
            continue
        for dtype in checked_dtypes(device):
            yield from compare_activation(device, rows, size, dtype, has_dropout=has_dropout)


def compare_embedding(device: torch.device, rows: int, size: int, *, has_dropout: bool = True) -> Iterator[Comparison]:
    """Rows of a table of eleven, some of them several times."""
    weight = random_bf16(11, size).float().to(device)
    ids = torch.arange(rows, device=device)[None] ** 2 % 11  # [1, R]
    seed, dropout_prob = _dropout(device, has_dropout=has_dropout)
    yield from compare_function(
        f"embedding R={rows} D={size}{' dropout' if has_dropout else ''}",
        lambda weight: embed(ids, weight, seed, dropout_prob, _EPS),
        lambda weight: reference.embed(ids, weight, seed, dropout_prob, _EPS),
        {"weight": weight},
    )


def compare_table(device: torch.device, rows: int, size: int) -> Iterator[Comparison]:
    """Gradients of rows added to a table of five, most of them to the last."""
    ids = (torch.arange(rows, device=device) ** 2 % 11).clamp(max=4)
    grad = random_bf16(rows, size).float().to(device)

    def table(dtype: torch.dtype) -> Tensor:
        return torch.ones(5, size, dtype=dtype, device=device)

    actual = table(torch.float32)
    fused.add_rows(actual, ids, grad)
    exact, plain = (table(dtype).index_add(0, ids, grad.to(dtype)) for dtype in (torch.float64, torch.float32))
    yield from compare(f"embedding's table R={rows} D={size}", actual, exact, plain)


def compare_activation(
    device: torch.device, rows: int, size: int, dtype: torch.dtype, *, has_dropout: bool = True
) -> Iterator[Comparison]:
    """The head's rows."""
    seed, dropout_prob = _dropout(device, has_dropout=has_dropout)
    yield from compare_function(
        f"head {str(dtype).removeprefix('torch.')} R={rows} D={size}{' dropout' if has_dropout else ''}",
        lambda x: activate(x, seed, dropout_prob, _EPS),
        lambda x: reference.activate(x, seed, dropout_prob, _EPS),
        {"x": random_bf16(rows, size).to(device, dtype)},
    )


def _dropout(device: torch.device, *, has_dropout: bool) -> tuple[Tensor | None, float]:
    return (torch.tensor([77, -5], dtype=torch.int32, device=device), 0.3) if has_dropout else (None, 0.0)
