"""The rule of `kernels/numerics.py` as assertions."""

from torch import Tensor

from kernels.numerics import compare, relative_error

__all__ = ["assert_accurate", "relative_error"]


def assert_accurate(
    actual: Tensor, reference: Tensor, plain: Tensor, off_target: Tensor | None = None, name: str = "tensor"
) -> None:
    """Fail unless `actual` obeys the rule; the arguments are those of `kernels.numerics.compare`."""
    for result in compare(name, actual, reference, plain, off_target):
        assert result.passed, f"{result.name}: error {result.error:.3e}, allowed {result.bound:.3e}"
