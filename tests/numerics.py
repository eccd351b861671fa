"""The one tolerance rule: a kernel may be about as wrong as plain PyTorch is in the kernel's own precision.

The reference is fp64 on the same rounded inputs. A tensor passes if its largest error is at most FACTOR times the error
of plain PyTorch, plus a floor of FLOOR roundings of that tensor's own largest entry. Entries much smaller than the
others (the logit gradients of classes that are not the label) are a group of their own, with a floor of their own:
otherwise the large ones would hide that they are all wrong.
"""

import torch
from torch import Tensor

FACTOR = 3.0
FLOOR = 4.0


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest absolute expected value; infinite where `actual` is not finite."""
    return _error(actual, expected) / max(_size(expected), torch.finfo(torch.float64).tiny)


def assert_accurate(
    actual: Tensor, reference: Tensor, plain: Tensor, off_target: Tensor | None = None, name: str = "tensor"
) -> None:
    """Fail unless `actual` obeys the rule.

    Args:
        actual: what is tested.
        reference: the same in fp64, from the same rounded inputs.
        plain: the same by plain PyTorch in the precision of `actual`; its type is the one `actual` must have.
        off_target: bool, entries to be checked apart from the others; broadcast to the shape of `actual`.
        name: what to call the tensor in the message.
    """
    assert actual.shape == reference.shape == plain.shape, f"{name}: shape {tuple(actual.shape)}"
    assert actual.dtype == plain.dtype, f"{name}: {actual.dtype}, expected {plain.dtype}"
    assert reference.dtype == torch.float64, f"{name}: the reference must be fp64"
    assert reference.isfinite().all(), f"{name}: the reference is not finite"
    off_target = torch.zeros((), dtype=torch.bool) if off_target is None else off_target
    off_target = off_target.expand(actual.shape)
    for group, mask in (("", ~off_target), (" off target", off_target)):
        if not mask.any():
            continue
        error, plain_error = _error(actual[mask], reference[mask]), _error(plain[mask], reference[mask])
        floor = FLOOR * torch.finfo(actual.dtype).eps * _size(reference[mask])
        allowed = FACTOR * plain_error + floor
        assert error <= allowed, (
            f"{name}{group}: error {error:.3e}, allowed {allowed:.3e} "
            f"(plain PyTorch {plain_error:.3e}, floor {floor:.3e}, size {_size(reference[mask]):.3e})"
        )


def _error(actual: Tensor, expected: Tensor) -> float:
    difference = (actual.double() - expected.double()).abs()
    return difference.nan_to_num(nan=torch.inf, posinf=torch.inf).max().item() if difference.numel() else 0.0


def _size(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0
