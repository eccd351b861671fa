"""Linear layers whose parameters have a copy in the products' dtype; gradients of weights are written in fp32.

Autocast narrows every weight at each use, writes its gradient in 16 bits and widens it: 12 bytes a parameter and two
launches that this does without. Layers with the same input have one product.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor


class Packed(NamedTuple):
    """Parameters side by side along their first dimension, and a copy of all of them in the products' dtype.

    Attributes:
        parts: parameters [E_i, D], or biases [E_i]; they get the gradients.
        narrow: [ΣE_i, D] or [ΣE_i], without gradient; the parameter itself if there is one, of that dtype.
    """

    parts: tuple[Tensor, ...]
    narrow: Tensor

    @classmethod
    def of(cls, parts: Sequence[Tensor], dtype: torch.dtype) -> Self:
        """The parameters with a new copy."""
        with torch.no_grad():
            copies = [part.to(dtype) for part in parts]
            narrow = torch.cat(copies) if len(copies) > 1 else copies[0]
        return cls(tuple(parts), narrow.detach())

    def first(self, count: int) -> Self:
        """The first `count` parameters."""
        parts = self.parts[:count]
        return type(self)(parts, self.narrow[: sum(map(len, parts))])

    def split(self) -> tuple[Tensor, ...]:
        """The copy of each parameter, a view."""
        return self.narrow.split([len(part) for part in self.parts])


def linear(x: Tensor, weight: Packed, bias: Packed | None = None) -> Tensor:
    """Product with the transposed weight, plus bias.

    Args:
        x: [..., D], in the dtype of the weight's copy.
        weight: [E, D] in all.
        bias: [E] in all, or None.

    Returns:
        [..., E].
    """
    parts = (*weight.parts, *(() if bias is None else bias.parts))
    return _Linear.apply(x, weight.narrow, None if bias is None else bias.narrow, len(weight.parts), *parts)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, count: int, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weights, ctx.biases = ([(len(part), part.dtype) for part in own] for own in (parts[:count], parts[count:]))
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        of_weights = split_gradient(weight_gradient(rows, x.flatten(0, -2)), ctx.weights)
        of_biases = split_gradient(rows.sum(dim=0, dtype=torch.float32), ctx.biases) if ctx.biases else ()
        of_x = grad @ weight if ctx.needs_input_grad[0] else None
        return of_x, None, None, None, *of_weights, *of_biases


def split_gradient(gradient: Tensor, parts: Sequence[tuple[int, torch.dtype]]) -> tuple[Tensor, ...]:
    """A packed parameter's gradient as those of its parts, given their lengths and dtypes."""
    each = gradient.split([length for length, _ in parts])
    return tuple(own.to(dtype) for own, (_, dtype) in zip(each, parts, strict=True))


@torch.library.custom_op("kernels::weight_gradient", mutates_args=())
def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """gradᵀ · x: [R, E] and [R, D] to [E, D] in fp32, where possible without rounding to their dtype first."""
    if grad.dtype == torch.float32:
        return grad.T @ x
    if multiplies_into_fp32(grad.device):
        return torch.mm(grad.T, x, out_dtype=torch.float32)
    return (grad.T @ x).float()


@weight_gradient.register_fake
def _(grad, x):
    return grad.new_empty(grad.shape[1], x.shape[1], dtype=torch.float32)


def multiplies_into_fp32(device: torch.device) -> bool:
    """Whether matmuls of 16-bit matrices can write fp32: on GPUs from sm_80 on."""
    return device.type == "meta" or (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0))
