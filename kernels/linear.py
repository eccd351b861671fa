"""Linear layers whose parameters have a copy in the products' dtype; gradients of weights are written in fp32.

Autocast narrows every weight at each use, writes its gradient in 16 bits and widens it: 12 bytes a parameter and two
launches that this does without. Layers with the same input have one product. Where a step has one backward, gradients
are written and not added to zeros: 8 bytes a parameter less.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.first_order import first_order

_BLOCK_ROWS = 256  # of a matrix, per in-place addition


class Packed(NamedTuple):
    """Parameters side by side along their first dimension, and a copy of all of them in the products' dtype.

    Attributes:
        parts: parameters [E_i, D], or biases [E_i]; they get the gradients.
        narrow: [ΣE_i, D] or [ΣE_i], without gradient; the parameter itself if there is one, of that dtype.
        gradient: like `narrow`, fp32, the memory of all their gradients, which stays; the backward adds to it, past
            autograd. None: autograd gets the gradients.
        overwrites: whether the product that makes the gradient of a weight overwrites that memory instead: right where
            one backward makes all of a step's gradient. Biases' gradients are always added.
    """

    parts: tuple[Tensor, ...]
    narrow: Tensor
    gradient: Tensor | None = None
    overwrites: bool = False

    @classmethod
    def of(cls, parts: Sequence[Tensor], dtype: torch.dtype) -> Self:
        """The parameters with a new copy."""
        with torch.no_grad():
            copies = [part.to(dtype) for part in parts]
            narrow = torch.cat(copies) if len(copies) > 1 else copies[0]
        return cls(tuple(parts), narrow.detach())

    def with_gradient(self, *, overwrites: bool = False) -> Self:
        """With the memory of the parameters' `grad`, if those are fp32 and side by side in one tensor."""
        grads = [part.grad for part in self.parts if part.grad is not None]
        if len(grads) < len(self.parts):
            return self
        if any(grad.dtype != torch.float32 or not grad.is_contiguous() for grad in grads):
            return self
        places = [grad.storage_offset() for grad in grads]
        ends = [place + grad.numel() for place, grad in zip(places, grads, strict=True)]
        if places[1:] != ends[:-1] or len({grad.untyped_storage().data_ptr() for grad in grads}) > 1:
            return self
        memory = grads[0].as_strided(self.narrow.shape, grads[0].stride())
        return self._replace(gradient=memory, overwrites=overwrites)

    def split(self) -> tuple[Tensor, ...]:
        """The copy of each parameter, a view."""
        return self.narrow.split([len(part) for part in self.parts])


class PackedGradient:
    """What a backward needs to know of packed weights or biases, to leave their gradient where it belongs.

    Args:
        gradient: see `Packed`.
        parts: see `Packed`.
        overwrites: see `Packed`.
    """

    def __init__(self, gradient: Tensor | None, parts: Sequence[Tensor], *, overwrites: bool = False) -> None:
        self._gradient = gradient
        self._overwrites = overwrites
        self._lengths = [len(part) for part in parts]
        self._dtypes = [part.dtype for part in parts]

    def of_weight(
        self, grad: Tensor, x: Tensor, first_grad: Tensor | None = None, first_x: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        """gradᵀ · x of [R, E] and [R, D]; and for the first parameter also first_gradᵀ · first_x.

        Returns:
            Each part's gradient for autograd; None where it is in the memory.
        """
        if self._gradient is not None:
            # in one operation: of two, for the whole and for a view of it, compiled code gave wrong sums (PyTorch 2.13)
            add_weight_gradient(grad, x, self._gradient, first_grad, first_x, self._overwrites)
            return (None,) * len(self._lengths)
        return self._split(
            weight_gradient(grad, x), None if first_grad is None else weight_gradient(first_grad, first_x)
        )

    def of_bias(self, grad: Tensor, first_grad: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """Sums over the rows of [R, E], likewise."""
        if self._gradient is not None:
            add_row_sums(grad, self._gradient, first_grad)
            return (None,) * len(self._lengths)
        return self._split(row_sums(grad), None if first_grad is None else row_sums(first_grad))

    def _split(self, gradient: Tensor, of_first: Tensor | None) -> tuple[Tensor, ...]:
        first, *rest = gradient.split(self._lengths)
        each = (first if of_first is None else first + of_first, *rest)
        return tuple(map(Tensor.to, each, self._dtypes))


def linear(x: Tensor, weight: Packed, bias: Packed | None = None) -> Tensor:
    """Product with the transposed weight, plus bias.

    Args:
        x: [..., D], in the dtype of the weight's copy.
        weight: [E, D] in all.
        bias: [E] in all, or None.

    Returns:
        [..., E].
    """
    return _Linear.apply(x, None, *_arguments(weight, bias))[0]


def linear_and_first(x: Tensor, first_x: Tensor, weight: Packed, bias: Packed) -> tuple[Tensor, Tensor]:
    """As `linear`, and the product of other rows with the first parameter alone.

    Args:
        x: [..., D], in the dtype of the weight's copy.
        first_x: [R, D], likewise.
        weight: [E, D] in all.
        bias: [E] in all.

    Returns:
        [..., E] and [R, E_0].
    """
    return _Linear.apply(x, first_x, *_arguments(weight, bias))


def _arguments(weight: Packed, bias: Packed | None) -> tuple[Tensor | int | None, ...]:
    bias_parts, *of_bias = ((), None, None) if bias is None else bias[:3]
    memories = (weight.gradient, of_bias[1], weight.overwrites)
    return weight.narrow, of_bias[0], *memories, len(weight.parts), *weight.parts, *bias_parts


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        first_x: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        weight_memory: Tensor | None,
        bias_memory: Tensor | None,
        overwrites: bool,
        count: int,
        *parts: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.save_for_backward(x, first_x, weight)
        ctx.weights = PackedGradient(weight_memory, parts[:count], overwrites=overwrites)
        ctx.biases = PackedGradient(bias_memory, parts[count:])
        ctx.has_bias, ctx.first_rows = bias is not None, len(parts[0])
        of_first = None
        if first_x is not None:
            first_bias = None if bias is None else bias[: ctx.first_rows]
            of_first = F.linear(first_x, weight[: ctx.first_rows], first_bias)
        return F.linear(x, weight, bias), of_first

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor, first_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        x, first_x, weight = ctx.saved_tensors
        first_grad = None if first_x is None else first_grad
        rows = grad.flatten(0, -2)
        of_weights = ctx.weights.of_weight(rows, x.flatten(0, -2), first_grad, first_x)
        of_biases = ctx.biases.of_bias(rows, first_grad) if ctx.has_bias else ()
        of_first_x = None if first_x is None else first_grad @ weight[: ctx.first_rows]
        return grad @ weight, of_first_x, *[None] * 6, *of_weights, *of_biases


# Sums over rows are operations, so that PyTorch adds them: Inductor does not split a sum over any number of rows among
# programs, and the order of its additions is that of the tiles which were fastest when it tried some.
@torch.library.custom_op("kernels::row_sums", mutates_args=())
def row_sums(grad: Tensor) -> Tensor:
    """Sums over the rows of [R, E], in fp32."""
    return grad.sum(dim=0, dtype=torch.float32)


@row_sums.register_fake
def _(grad):
    return grad.new_empty(grad.shape[1], dtype=torch.float32)


@torch.library.custom_op("kernels::add_row_sums", mutates_args={"total"})
def add_row_sums(grad: Tensor, total: Tensor, first_grad: Tensor | None = None) -> None:
    """Add `row_sums` to [E], and those of [R', E'] to its first E'."""
    sums = row_sums(grad)
    if first_grad is not None:
        sums[: first_grad.shape[1]].add_(row_sums(first_grad))
    total.add_(sums)


@add_row_sums.register_fake
def _(grad, total, first_grad=None):
    del grad, total, first_grad


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


@torch.library.custom_op("kernels::add_weight_gradient", mutates_args={"total"})
def add_weight_gradient(
    grad: Tensor,
    x: Tensor,
    total: Tensor,
    first_grad: Tensor | None = None,
    first_x: Tensor | None = None,
    overwrites: bool = False,
) -> None:
    """Add `weight_gradient` to [E, D], or overwrite that; and add that of [R', E'] and [R', D] to its first E' rows."""
    add_product(total, grad.T, x, overwrites=overwrites)
    if first_grad is not None and first_x is not None:
        add_product(total[: first_grad.shape[1]], first_grad.T, first_x)


@add_weight_gradient.register_fake
def _(grad, x, total, first_grad=None, first_x=None, overwrites=False):
    del grad, x, total, first_grad, first_x, overwrites


def add_product(total: Tensor, left: Tensor, right: Tensor, *, overwrites: bool = False) -> None:
    """Add left · right to `total` [E, D], or overwrite that; in its dtype, where possible without rounding before."""
    if left.dtype == total.dtype:
        torch.mm(left, right, out=total) if overwrites else total.addmm_(left, right)
    elif multiplies_into_fp32(left.device):
        if overwrites:
            torch.mm(left, right, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    elif overwrites:
        total.copy_(left @ right)
    else:  # in blocks: PyTorch would cast the whole addend to a new tensor, which takes longer than the addition
        for part, addend in zip(total.split(_BLOCK_ROWS), (left @ right).split(_BLOCK_ROWS), strict=True):
            part.add_(addend)


@functools.cache
def multiplies_into_fp32(device: torch.device) -> bool:
    """Whether matmuls of 16-bit matrices write fp32 and add to it: on GPUs from sm_80 on, tried out at the first call.

    `out_dtype` is new in PyTorch, and its first versions did not take an fp32 addend.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return device.type == "meta"
    ones = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
    total = torch.full((16, 16), 2**-10, dtype=torch.float32, device=device)  # which bf16 does not add to 16
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
        product = torch.mm(ones, ones, out_dtype=torch.float32, out=torch.empty_like(total))
    except (RuntimeError, TypeError):
        return False
    return bool((total == 16 + 2**-10).all() and (product == 16).all())
