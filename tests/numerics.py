"""Assertions for the rule of `kernels/numerics.py`, comparisons of tensor lists, and test inputs for C++ kernels."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from kernels.numerics import compare, relative_error

__all__ = ["assert_accurate", "assert_near", "close", "on_threads", "relative_error", "same", "scattered"]


def assert_accurate(
    actual: Tensor,
    reference: Tensor,
    plain: Tensor,
    off_target: Tensor | None = None,
    name: str = "tensor",
    rounding: float = 0.0,
) -> None:
    """Fail unless `actual` satisfies the rule; arguments as in `kernels.numerics.compare`."""
    for result in compare(name, actual, reference, plain, off_target, rounding=rounding):
        assert result.passed, f"{result.name}: error {result.error:.3e}, allowed {result.bound:.3e}"


def assert_near(actual: Tensor, exact: Tensor, plain: Tensor, dtype: torch.dtype, name: str = "tensor") -> None:
    """Fail unless the error of `actual` is about that of `plain`, which was computed in the same precision.

    For comparisons across devices and compilers: their summation order and exponentials differ by more roundings than
    the rule of `kernels/numerics.py` allows.

    Args:
        actual: on any device.
        exact: in fp64.
        plain: from eager PyTorch.
        dtype: dtype of the arithmetic, fp32 or bf16, whatever the result's dtype.
        name: the tensor's name in messages.
    """
    exact, slack = exact.cpu(), {torch.float32: 1e-4, torch.bfloat16: 0.02}[dtype]
    errors = [relative_error(tensor.cpu(), exact) for tensor in (actual, plain)]
    assert actual.dtype == plain.dtype, name
    assert errors[0] < 3 * errors[1] + slack, f"{name}: relative error {errors[0]:.2e}, plain {errors[1]:.2e}"


def same(one: Iterable[Tensor], other: Iterable[Tensor]) -> bool:
    """Whether all pairs of tensors are bitwise equal."""
    return all(torch.equal(left, right) for left, right in zip(one, other, strict=True))


def close(actual: Iterable[Tensor], expected: Iterable[Tensor], tolerance: float = 1e-6) -> bool:
    """Whether all tensors are within a relative error of the expected ones."""
    pairs = zip(actual, expected, strict=True)
    return all(relative_error(left, right) < tolerance for left, right in pairs if left.numel())


def scattered(tensor: Tensor) -> Tensor:
    """The same tensor with no two elements adjacent in memory; the gaps are NaN, or 1 for integers."""
    between = torch.full_like(tensor, torch.nan if tensor.is_floating_point() else 1)
    return torch.stack([tensor, between], dim=-1)[..., 0]


def on_threads(count: int, function: Callable, *arguments: object) -> object:
    """Call a function with this number of PyTorch threads; returns its result."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return function(*arguments)
    finally:
        torch.set_num_threads(before)
