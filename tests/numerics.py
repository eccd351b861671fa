"""The rule of `kernels/numerics.py` as assertions, and comparisons of lists of tensors."""

from collections.abc import Iterable

import torch
from torch import Tensor

from kernels.numerics import compare, relative_error

__all__ = ["assert_accurate", "close", "relative_error", "same"]


def assert_accurate(
    actual: Tensor, reference: Tensor, plain: Tensor, off_target: Tensor | None = None, name: str = "tensor"
) -> None:
    """Fail unless `actual` obeys the rule; the arguments are those of `kernels.numerics.compare`."""
    for result in compare(name, actual, reference, plain, off_target):
        assert result.passed, f"{result.name}: error {result.error:.3e}, allowed {result.bound:.3e}"


def same(one: Iterable[Tensor], other: Iterable[Tensor]) -> bool:
    """Whether all pairs of tensors are equal to the bit."""
    return all(torch.equal(left, right) for left, right in zip(one, other, strict=True))


def close(actual: Iterable[Tensor], expected: Iterable[Tensor], tolerance: float = 1e-6) -> bool:
    """Whether all tensors are within a relative error of those expected."""
    pairs = zip(actual, expected, strict=True)
    return all(relative_error(left, right) < tolerance for left, right in pairs if left.numel())
