"""Dropout of one tensor by several masks in Triton: registered operations."""

import torch
from torch import Tensor

from kernels import wanted
from kernels.backend import triton_kernel
from kernels.first_order import refuse_tangents


def is_fused(device: torch.device, backend: str | None = None) -> bool:
    """Whether `dropouts` runs in the fused kernels: wanted, backend "triton".

    Args:
        device: of the tensor.
        backend: see `kernels.backend.choose_backend`.
    """
    return wanted.runs("dropout", device, backend)


def dropouts(x: Tensor, seeds: Tensor, dropout_prob: float, dtype: torch.dtype) -> Tensor:
    """Dropout of the same tensor by each of several masks; one launch forward, one backward.

    Args:
        x: fp32, of any shape, fewer than 2³¹ elements.
        seeds: [L, 2] int32; each mask is that of `kernels.dropout.dropout` with its seed.
        dropout_prob: probability of a zero, in [0, 1).
        dtype: of the result.

    Returns:
        [L, *x.shape].
    """
    refuse_tangents(x)
    return forward(x, seeds, dropout_prob, dtype)


@torch.library.custom_op("kernels::dropouts", mutates_args=())
def forward(x: Tensor, seeds: Tensor, dropout_prob: float, dtype: torch.dtype) -> Tensor:
    """See `dropouts`."""
    return triton_kernel("dropout").forward(x.contiguous(), seeds, dropout_prob, dtype)


@forward.register_fake
def _(x, seeds, dropout_prob, dtype):
    return x.new_empty(len(seeds), *x.shape, dtype=dtype)


@torch.library.custom_op("kernels::dropouts_backward", mutates_args=())
def backward(grad: Tensor, seeds: Tensor, dropout_prob: float, dtype: torch.dtype) -> Tensor:
    """The gradient of x, in its dtype: summed over the masks in fp32, in their order."""
    return triton_kernel("dropout").backward(grad.contiguous(), seeds, dropout_prob, dtype)


@backward.register_fake
def _(grad, seeds, dropout_prob, dtype):
    return grad.new_empty(grad.shape[1:], dtype=dtype)


def _keep_inputs(ctx, inputs, output) -> None:
    x, seeds, ctx.dropout_prob, _ = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(seeds)


def _gradients(ctx, grad):
    return backward(grad, *ctx.saved_tensors, ctx.dropout_prob, ctx.dtype), None, None, None


forward.register_autograd(_gradients, setup_context=_keep_inputs)
