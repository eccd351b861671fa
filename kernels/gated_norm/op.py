"""The operation with its backward by the C++ or the Triton kernels."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.first_order import first_order
from kernels.gated_norm import cpp, fused
from kernels.linear import Packed, PackedGradient


def gated_norm(gate: Tensor, linear: Tensor | None, weight: Tensor, approximate: str, eps: float) -> Tensor:
    """See `kernels.gated_norm`, by the C++ kernels; the gate is bf16."""
    return _GatedNorm.apply(gate, linear, None, None, weight, approximate == "tanh", eps, False, False)


def fused_gated_norm(gate: Tensor, linear: Tensor | None, weight: Packed, approximate: str, eps: float) -> Tensor:
    """See `kernels.gated_norm`, by the Triton kernels; the weight is one parameter."""
    memories = (weight.narrow, weight.gradient)
    settings = (approximate == "tanh", eps, True, weight.overwrites)
    return _GatedNorm.apply(gate, linear, *memories, *weight.parts, *settings)


class _GatedNorm(torch.autograd.Function):
    """Saves its inputs, and recomputes the normalized product in the backward: it is a block's largest tensor."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        linear: Tensor | None,
        narrow: Tensor | None,
        memory: Tensor | None,
        weight: Tensor,
        is_tanh: bool,
        eps: float,
        is_fused: bool,
        overwrites: bool,
    ) -> Tensor:
        normalized, mean, inverse_std = (fused if is_fused else cpp).gated_norm(gate, linear, is_tanh, eps)
        narrow = weight.to(gate.dtype) if narrow is None else narrow
        ctx.save_for_backward(gate, linear, narrow, mean, inverse_std)
        ctx.is_tanh, ctx.is_fused, ctx.dtype = is_tanh, is_fused, weight.dtype
        ctx.packed = PackedGradient(memory, [weight], overwrites=overwrites)
        return F.linear(normalized, narrow)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, linear, weight, mean, inverse_std = ctx.saved_tensors
        of_gate, of_linear, normalized = (fused if ctx.is_fused else cpp).gated_norm_backward(
            grad @ weight, gate, linear, mean, inverse_std, ctx.is_tanh
        )
        grad_rows, rows = grad.flatten(0, -2), normalized.flatten(0, -2)
        if ctx.is_fused:
            (of_weight,) = ctx.packed.of_weight(grad_rows, rows)
        else:
            of_weight = (grad_rows.T @ rows).to(ctx.dtype)
        return of_gate, None if linear is None else of_linear, None, None, of_weight, *[None] * 4
