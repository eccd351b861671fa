"""The embedding and the head's GELU, each with LayerNorm and dropout, in one Triton pass: registered operations."""

from typing import Any

import torch
from torch import Tensor

from kernels import wanted, whole_rows
from kernels.backend import triton_kernel
from kernels.first_order import first_order, refuse_tangents


def is_fused(device: torch.device, size: int, backend: str | None = None) -> bool:
    """Whether rows of this size are normalized in the fused kernels: wanted, backend "triton".

    Args:
        device: of the rows.
        size: D.
        backend: see `kernels.backend.choose_backend`.
    """
    return wanted.runs("normalize", device, backend) and size <= whole_rows.WIDEST


def embed(
    ids: Tensor, weight: Tensor, seed: Tensor | None, dropout_prob: float, eps: float, memory: Tensor | None = None
) -> Tensor:
    """dropout(LayerNorm(weight[ids])), for sizes of which `is_fused` is true.

    Args:
        ids: integers of any shape, rows of the weight.
        weight: [V, D].
        seed: [2] int32, or None; the mask is that of `kernels.dropout` for the result.
        dropout_prob: probability of a zero.
        eps: of LayerNorm.
        memory: like the weight, fp32 and contiguous; the backward adds the weight's gradient to it, past autograd.
            None: autograd gets the gradient.

    Returns:
        [..., D] in the weight's dtype.
    """
    if memory is not None:
        return _Embed.apply(weight, ids, seed if dropout_prob else None, memory, dropout_prob, eps)
    refuse_tangents(weight)
    return forward(weight, ids, seed if dropout_prob else None, dropout_prob, eps)


def activate(x: Tensor, seed: Tensor | None, dropout_prob: float, eps: float) -> Tensor:
    """dropout(LayerNorm(GELU(x))) of x [..., D], in its dtype; GELU is exact, and the rest as for `embed`."""
    refuse_tangents(x)
    return forward(x, None, seed if dropout_prob else None, dropout_prob, eps)


@torch.library.custom_op("kernels::fused_normalize", mutates_args=())
def forward(x: Tensor, ids: Tensor | None, seed: Tensor | None, dropout_prob: float, eps: float) -> Tensor:
    """`embed` with ids, `activate` without."""
    rows = None if ids is None else ids.reshape(-1).contiguous()
    result = triton_kernel("normalize").forward(x.reshape(-1, x.shape[-1]).contiguous(), rows, seed, dropout_prob, eps)
    return result.view(_shape(x, ids))


@forward.register_fake
def _(x, ids, seed, dropout_prob, eps):
    return x.new_empty(_shape(x, ids))


@torch.library.custom_op("kernels::fused_normalize_backward", mutates_args=())
def backward(
    grad: Tensor, x: Tensor, ids: Tensor | None, seed: Tensor | None, dropout_prob: float, eps: float
) -> Tensor:
    """The gradient of x, or of its rows with these ids, in the shape of the result."""
    rows = None if ids is None else ids.reshape(-1).contiguous()
    grad_rows, x_rows = (each.reshape(-1, each.shape[-1]).contiguous() for each in (grad, x))
    return triton_kernel("normalize").backward(grad_rows, x_rows, rows, seed, dropout_prob, eps).view(grad.shape)


@backward.register_fake
def _(grad, x, ids, seed, dropout_prob, eps):
    return x.new_empty(grad.shape)


def _keep_inputs(ctx, inputs, output) -> None:
    *tensors, ctx.dropout_prob, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, grad):
    x, ids, _ = ctx.saved_tensors
    of_x = backward(grad, *ctx.saved_tensors, ctx.dropout_prob, ctx.eps)
    if ids is not None:  # rows of the same id are summed in a fixed order
        of_x = torch.ops.aten.embedding_dense_backward(of_x, ids, len(x), -1, False)
    return of_x, None, None, None, None


forward.register_autograd(_gradients, setup_context=_keep_inputs)


class _Embed(torch.autograd.Function):
    """`embed` whose backward adds to the memory of the table's gradient, of which it touches a step's rows alone."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, ids: Tensor, seed: Tensor | None, memory: Tensor, dropout_prob: float, eps: float
    ) -> Tensor:
        ctx.save_for_backward(weight, ids, seed)
        ctx.memory, ctx.settings = memory, (dropout_prob, eps)
        return forward(weight.detach(), ids, seed, dropout_prob, eps)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        weight, ids, seed = ctx.saved_tensors
        of_rows = backward(grad, weight.detach(), ids, seed, *ctx.settings)
        add_rows(ctx.memory, ids.flatten(), of_rows.flatten(0, -2))
        return (None,) * 6


@torch.library.custom_op("kernels::add_rows", mutates_args={"table"})
def add_rows(table: Tensor, ids: Tensor, grad: Tensor) -> None:
    """Add gradients [R, D] of rows with ids [R] to a table [V, D]; both fp32. The same input gives the same bits."""
    triton_kernel("normalize").add_rows(table, ids, grad.contiguous())


@add_rows.register_fake
def _(table, ids, grad):
    del table, ids, grad


def _shape(x: Tensor, ids: Tensor | None) -> list[int]:
    return [*(x.shape[:-1] if ids is None else ids.shape), x.shape[-1]]
