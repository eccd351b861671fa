"""The operation with its backward by the C++ kernels."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.gated_norm import cpp


def gated_norm(gate: Tensor, linear: Tensor | None, weight: Tensor, approximate: str, eps: float) -> Tensor:
    """See `kernels.gated_norm`; the gate is bf16."""
    return _GatedNorm.apply(gate, linear, weight, approximate == "tanh", eps)


class _GatedNorm(torch.autograd.Function):
    """Saves its inputs, and recomputes the normalized product in the backward: it is a block's largest tensor."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, linear: Tensor | None, weight: Tensor, is_tanh: bool, eps: float) -> Tensor:
        normalized, mean, inverse_std = cpp.gated_norm(gate, linear, is_tanh, eps)
        narrow = weight.to(gate.dtype)
        ctx.save_for_backward(gate, linear, narrow, mean, inverse_std)
        ctx.is_tanh, ctx.dtype = is_tanh, weight.dtype
        return F.linear(normalized, narrow)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, linear, weight, mean, inverse_std = ctx.saved_tensors
        of_gate, of_linear, normalized = cpp.gated_norm_backward(
            grad @ weight, gate, linear, mean, inverse_std, ctx.is_tanh
        )
        of_weight = (grad.flatten(0, -2).T @ normalized.flatten(0, -2)).to(ctx.dtype)
        return of_gate, None if linear is None else of_linear, of_weight, None, None
