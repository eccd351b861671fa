"""LayerNorm(linear · GELU(gate)) and its backward in Triton: registered operations, with the signatures of `cpp.py`."""

import torch
from torch import Tensor

from kernels import wanted, whole_rows
from kernels.backend import triton_kernel


def is_fused(device: torch.device, dtype: torch.dtype, size: int, backend: str | None = None) -> bool:
    """Whether gated norms of this size run in the fused kernels: wanted, backend "triton".

    Args:
        device: of linear and gate.
        dtype: theirs.
        size: D.
        backend: see `kernels.backend.choose_backend`.
    """
    return (
        wanted.runs("gated_norm", device, backend) and whole_rows.supports(dtype, device) and size <= whole_rows.WIDEST
    )


@torch.library.custom_op("kernels::fused_gated_norm", mutates_args=())
def gated_norm(gate: Tensor, linear: Tensor | None, is_tanh: bool, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm(linear · GELU(gate)).

    Args:
        gate: [B, T, D]; without `linear` [B, T, 2D], linear and gate concatenated.
        linear: [H, B, T, d], D = H·d, or None.
        is_tanh: whether to use the tanh approximation of GELU.
        eps: of LayerNorm.

    Returns:
        The normalized product [B, T, D]; mean and inverse standard deviation [B, T] in fp32.
    """
    shape = gate.shape[:-1]
    normalized, mean, inverse_std = triton_kernel("gated_norm").forward(*_rows(gate, linear), is_tanh=is_tanh, eps=eps)
    return normalized.view(*shape, normalized.shape[1]), mean.view(shape), inverse_std.view(shape)


@gated_norm.register_fake
def _(gate, linear, is_tanh, eps):
    del is_tanh, eps
    *shape, size = gate.shape
    statistics = (gate.new_empty(shape, dtype=torch.float32) for _ in range(2))
    return gate.new_empty(*shape, size // 2 if linear is None else size), *statistics


@torch.library.custom_op("kernels::fused_gated_norm_backward", mutates_args=())
def gated_norm_backward(
    grad: Tensor, gate: Tensor, linear: Tensor | None, mean: Tensor, inverse_std: Tensor, is_tanh: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `gate` and `linear` (empty without), and the normalized product, recomputed."""
    grad_gate, grad_linear, normalized = _gradients(grad, gate, linear)
    written = _rows(grad_gate, None if linear is None else grad_linear)
    statistics = (mean.view(-1), inverse_std.view(-1))
    rows = grad.reshape(-1, grad.shape[-1]).contiguous()
    triton_kernel("gated_norm").backward(
        rows, *_rows(gate, linear), *statistics, *written, normalized.view(rows.shape), is_tanh=is_tanh
    )
    return grad_gate, grad_linear, normalized


@gated_norm_backward.register_fake
def _(grad, gate, linear, mean, inverse_std, is_tanh):
    del mean, inverse_std, is_tanh
    return _gradients(grad, gate, linear)


def _gradients(grad: Tensor, gate: Tensor, linear: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """New tensors for the results of the backward; that of `linear` as a view of [B, T, D]."""
    if linear is None:
        of_linear = gate.new_empty(0)
    else:
        heads, *shape, width = linear.shape
        of_linear = gate.new_empty(*shape, heads, width).movedim(-2, 0)
    return gate.new_empty(gate.shape), of_linear, gate.new_empty(grad.shape)


def _rows(gate: Tensor, linear: Tensor | None) -> tuple[Tensor, Tensor]:
    """Linear and gate [R, D], rows equally far apart, each as it lies in memory where that is possible."""
    gate = _dense_columns(gate.flatten(0, -2))
    if linear is None:
        linear, gate = gate.chunk(2, dim=-1)
        return linear, gate
    return _dense_columns(linear.movedim(0, -2).flatten(0, -3).flatten(1)), gate


def _dense_columns(rows: Tensor) -> Tensor:
    return rows if rows.stride(1) == 1 else rows.contiguous()
