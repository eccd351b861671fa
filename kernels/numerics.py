"""The one tolerance rule: a kernel may be about as wrong as plain PyTorch is in the kernel's own precision.

The reference is fp64 on the same rounded inputs. A tensor passes if its largest error is at most FACTOR times the error
of plain PyTorch, plus a floor of FLOOR roundings of that tensor's own largest entry. Entries much smaller than the
others (the logit gradients of classes that are not the label) are a group of their own, with a floor of their own:
otherwise the large ones would hide that they are all wrong.

A sum of many terms may also differ from plain PyTorch's by what another order of additions does (`sum_rounding`):
PyTorch's own order depends on the machine, and on some it happens to be nearly exact.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

FACTOR = 3.0
FLOOR = 4.0


@dataclass(frozen=True)
class Comparison:
    """A tensor's error beside what the rule allows, both absolute.

    Attributes:
        name: of the tensor.
        error: largest absolute difference to the reference; infinite where the tensor is not finite.
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
        actual: what is tested.
        reference: the same in fp64, from the same rounded inputs.
        plain: the same by plain PyTorch in the precision of `actual`; its type is the one `actual` must have.
        off_target: bool, entries to be compared apart from the others; broadcast to the shape of `actual`.
        rounding: added to the bound, from `sum_rounding`.

    Raises:
        AssertionError: a shape or a type is wrong, or the reference is not finite.
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


def compare_exactly(name: str, actual: Tensor, expected: Tensor) -> Comparison:
    """A comparison for integers and for results that must agree to the bit: the number of entries that differ, and 0.

    Raises:
        AssertionError: a shape or a type is wrong.
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
    """Apply the rule to a function's result and to its gradients with respect to all inputs.

    Args:
        name: what to call the function.
        actual: what is tested, a function of the tensors in `inputs` by name.
        reference: the same in PyTorch, called with the inputs in fp64.
        inputs: rounded to the types of `actual`.
        plain: the same by plain PyTorch in the precision of `actual`; `reference` with the inputs as they are if None.
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
    """What additions in fp32, in any order, may make of sums: √n · 2⁻²⁴ · Σ|terms|.

    A bound that holds with high probability, from the arithmetic alone (Higham & Mary 2019, "A new approach to
    probabilistic rounding error analysis", SIAM J. Sci. Comput. 41(5), theorem 3.1).

    Args:
        terms: [..., n], each row of which is added up.

    Returns:
        The largest of all rows.
    """
    return math.sqrt(terms.shape[-1]) * 2.0**-24 * terms.abs().sum(dim=-1, dtype=torch.float64).max().item()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest absolute expected value; infinite where `actual` is not finite."""
    return _error(actual, expected) / max(_size(expected), torch.finfo(torch.float64).tiny)


def _error(actual: Tensor, expected: Tensor) -> float:
    difference = (actual.double() - expected.double()).abs()
    return difference.nan_to_num(nan=torch.inf, posinf=torch.inf).max().item() if difference.numel() else 0.0


def _size(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0
