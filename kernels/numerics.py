"""The one tolerance rule: a kernel's error may be a small multiple of plain PyTorch's in the kernel's precision.

The reference is fp64 on the same rounded inputs. A tensor passes if its largest error is at most FACTOR times the error
of plain PyTorch, plus a floor of FLOOR roundings of the tensor's largest entry. Entries much smaller than the rest (the
logit gradients of classes other than the label) are a separate group with a separate floor: otherwise the large ones
would hide errors in all of them.

A sum of many terms may also differ from plain PyTorch's by the effect of a different order of additions
(`sum_rounding`): PyTorch's order depends on the machine, and on some it is nearly exact by chance.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.backend import computes_as_gpu
from kernels.run import Run

FACTOR = 3.0
FLOOR = 4.0


def checked_dtypes(device: torch.device, run: Run | None = None) -> tuple[torch.dtype, ...]:
    """In which Triton kernels are compared: bf16 and fp32, or the run's; interpreted, fp32 alone."""
    if not computes_as_gpu(device):
        return (torch.float32,)
    return (torch.bfloat16, torch.float32) if run is None else (run.logits_type,)


@dataclass(frozen=True)
class Comparison:
    """A tensor's error and the bound of the rule, both absolute.

    Attributes:
        name: the tensor's.
        error: largest absolute difference from the reference; infinite if the tensor is not finite.
        bound: the largest error that passes.
    """

    name: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the bound."""
        return self.error <= self.bound


def compare(
    name: str,
    actual: Tensor,
    reference: Tensor,
    plain: Tensor,
    off_target: Tensor | None = None,
    *,
    rounding: float = 0.0,
) -> list[Comparison]:
    """Apply the rule.

    Args:
        name: what to call the tensor.
        actual: the tested result.
        reference: in fp64, from the same rounded inputs.
        plain: by plain PyTorch in the precision of `actual`, which must have its dtype.
        off_target: bool, entries to compare as a separate group; broadcast to the shape of `actual`.
        rounding: added to the bound, from `sum_rounding`.

    Raises:
        AssertionError: a shape or dtype is wrong, or the reference is not finite.
    """
    if not actual.shape == reference.shape == plain.shape:
        raise AssertionError(f"{name}: shapes {tuple(actual.shape)}, {tuple(reference.shape)}, {tuple(plain.shape)}")
    if actual.dtype != plain.dtype:
        raise AssertionError(f"{name}: {actual.dtype}, expected {plain.dtype}")
    if reference.dtype != torch.float64 or not reference.isfinite().all():
        raise AssertionError(f"{name}: the reference must be fp64 and finite")
    off_target = torch.zeros((), dtype=torch.bool) if off_target is None else off_target
    off_target = off_target.to(actual.device).expand(actual.shape)
    comparisons = []
    for group, mask in ((name, ~off_target), (f"{name} off target", off_target)):
        if mask.any():
            floor = FLOOR * torch.finfo(actual.dtype).eps * _size(reference[mask])
            bound = FACTOR * _error(plain[mask], reference[mask]) + floor + rounding
            comparisons.append(Comparison(group, _error(actual[mask], reference[mask]), bound))
    return comparisons


def compare_all(names: str, *results: Sequence[Tensor]) -> Iterator[Comparison]:
    """Apply the rule to several tensors.

    Args:
        names: of the tensors, separated by ", ".
        results: three sequences of tensors: the kernel's, the fp64 reference's, plain PyTorch's.
    """
    for name, *tensors in zip(names.split(", "), *results, strict=True):
        yield from compare(name, *tensors)


def random_bf16(*shape: int) -> Tensor:
    """Standard normal numbers in bf16 on the CPU; a function of the shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


def compare_exactly(name: str, actual: Tensor, expected: Tensor) -> Comparison:
    """For integers and bit-identical results: the error is the number of entries that differ, the bound 0.

    Raises:
        AssertionError: a shape or dtype is wrong.
    """
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise AssertionError(f"{name}: {actual.dtype} {tuple(actual.shape)}, {expected.dtype} {tuple(expected.shape)}")
    return Comparison(name, float((actual != expected).sum()), 0.0)


def compare_function(
    name: str,
    actual: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: Mapping[str, Tensor],
    plain: Callable[..., Tensor] | None = None,
) -> Iterator[Comparison]:
    """Apply the rule to a function's result and its gradients with respect to all inputs.

    Args:
        name: what to call the function.
        actual: the tested function; `inputs` are its keyword arguments.
        reference: in PyTorch, called with the inputs in fp64.
        inputs: in the dtypes of `actual`.
        plain: by plain PyTorch in the precision of `actual`; None: `reference` with the inputs unchanged.
    """
    results = []
    for function, dtype in ((actual, None), (reference, torch.float64), (plain or reference, None)):
        leaves = {key: tensor.detach().to(dtype or tensor.dtype, copy=True) for key, tensor in inputs.items()}
        leaves = {key: tensor.requires_grad_() for key, tensor in leaves.items()}
        result = function(**leaves)
        generator = torch.Generator().manual_seed(result.numel())
        grad = torch.randn(result.shape, generator=generator).bfloat16().to(result.device, result.dtype)
        results.append([result.detach(), *torch.autograd.grad(result, list(leaves.values()), grad)])
    for part, *tensors in zip(("result", *(f"∂{key}" for key in inputs)), *results, strict=True):
        yield from compare(f"{name}: {part}", *tensors)


def sum_rounding(terms: Tensor) -> float:
    """Error bound for fp32 sums in any order of additions: √n · 2⁻²⁴ · Σ|terms|.

    It holds with high probability and follows from the arithmetic alone (Higham & Mary 2019, "A new approach to
    probabilistic rounding error analysis", SIAM J. Sci. Comput. 41(5), theorem 3.1).

    Args:
        terms: [..., n], summed over the last dimension.

    Returns:
        The largest bound of all sums.
    """
    return math.sqrt(terms.shape[-1]) * 2.0**-24 * terms.abs().sum(dim=-1, dtype=torch.float64).max().item()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest absolute expected value; infinite if `actual` is not finite."""
    return _error(actual, expected) / max(_size(expected), torch.finfo(torch.float64).tiny)


def _error(actual: Tensor, expected: Tensor) -> float:
    difference = (actual.double() - expected.double()).abs()
    return difference.nan_to_num(nan=torch.inf, posinf=torch.inf).max().item() if difference.numel() else 0.0


def _size(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0
