"""LayerNorm(linear · GELU(gate)) and its backward by the C++ kernels: registered operations in bf16."""

import torch
from torch import Tensor

from kernels import cpp


def _fake_gated_norm(gate, linear, is_tanh, eps):
    return _normalized(gate, linear)


@cpp.operation(_fake_gated_norm)
def gated_norm(gate: Tensor, linear: Tensor | None, is_tanh: bool, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm(linear · GELU(gate)), in bf16.

    Args:
        gate: [B, T, D]; without `linear` [B, T, 2D], linear and gate concatenated.
        linear: [H, B, T, d], D = H·d, or None.
        is_tanh: whether to use the tanh approximation of GELU.
        eps: of LayerNorm.

    Returns:
        The normalized product [B, T, D]; mean and inverse standard deviation [B, T] in fp32.
    """
    outputs = _normalized(gate, linear)
    inputs, sizes, strides = _memory(gate, linear)
    cpp.call("gated_norm", (*inputs, *outputs, *sizes, *strides, int(is_tanh), eps))
    return outputs


def _fake_gated_norm_backward(grad, gate, linear, mean, inverse_std, is_tanh):
    return _gradients(grad, gate, linear)


@cpp.operation(_fake_gated_norm_backward)
def gated_norm_backward(
    grad: Tensor, gate: Tensor, linear: Tensor | None, mean: Tensor, inverse_std: Tensor, is_tanh: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `gate` and `linear` (empty without), and the normalized product, recomputed."""
    grad = grad.contiguous()
    grad_gate, grad_linear, normalized = outputs = _gradients(grad, gate, linear)
    inputs, sizes, strides = _memory(gate, linear)
    grads, _, grad_strides = _memory(grad_gate, None if linear is None else grad_linear)
    tensors = (grad, *inputs, mean, inverse_std, *grads, normalized)
    cpp.call("gated_norm_backward", (*tensors, *sizes, *strides, *grad_strides, int(is_tanh)))
    return outputs


def _normalized(gate: Tensor, linear: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, size = gate.shape
    mean, inverse_std = (gate.new_empty(batch, length, dtype=torch.float32) for _ in range(2))
    return gate.new_empty(batch, length, size // 2 if linear is None else size), mean, inverse_std


def _gradients(grad: Tensor, gate: Tensor, linear: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    of_linear = grad.new_empty(0 if linear is None else linear.shape)
    return grad.new_empty(gate.shape), of_linear, grad.new_empty(grad.shape)


def _memory(gate: Tensor, linear: Tensor | None) -> tuple[tuple[Tensor, ...], tuple[int, ...], tuple[int, ...]]:
    """(linear, gate); (rows, groups, width); strides: rows and groups of `linear`, rows of the gate."""
    batch, length, size = gate.shape
    gate = gate.flatten(0, 1)  # one row stride, even if a dimension of size 1 has an arbitrary one
    gate = gate if gate.stride(1) == 1 else gate.contiguous()
    if linear is None:
        linear, gate = gate.chunk(2, dim=-1)
        return (linear, gate), (batch * length, 1, size // 2), (gate.stride(0), 0, gate.stride(0))
    heads, *rows, width = linear.shape
    if rows != [batch, length] or heads * width != size:
        raise ValueError(f"linear: {list(linear.shape)} beside a gate {[batch, length, size]}; expected [H, B, T, D/H]")
    linear = linear.contiguous()
    return (linear, gate), (batch * length, heads, width), (width, batch * length * width, gate.stride(0))
