"""The gated product that ends both sub-layers: the public operation."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import cpp
from kernels.gated_norm import op, reference


def gated_product(
    gate: Tensor,
    linear: Tensor | None,
    weight: Tensor,
    *,
    approximate: Literal["none", "tanh"],
    eps: float,
) -> Tensor:
    """LayerNorm(linear · GELU(gate)) times a matrix.

    Args:
        gate: [B, T, D]; without `linear` [B, T, 2D], that and the gate side by side.
        linear: [H, B, T, d], D = H·d, or None.
        weight: [E, D].
        approximate: as of torch.nn.functional.gelu.
        eps: of LayerNorm.

    Returns:
        [B, T, E].
    """
    if cpp.serves(gate):
        return _GatedProduct.apply(gate, linear, weight, approximate == "tanh", eps)
    if linear is None:
        linear, gate = gate.chunk(2, dim=-1)
    else:
        linear = linear.permute(1, 2, 0, 3).flatten(2)  # [B, T, D]
    return F.linear(reference.gated_norm(linear, gate, approximate, eps), weight)


class _GatedProduct(torch.autograd.Function):
    """Keeps what comes in, and computes the normalized product again: it is the largest of a block's tensors."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, linear: Tensor | None, weight: Tensor, is_tanh: bool, eps: float) -> Tensor:
        normalized, mean, inverse_std = op.gated_norm(gate, linear, is_tanh, eps)
        narrow = weight.to(gate.dtype)
        ctx.save_for_backward(gate, linear, narrow, mean, inverse_std)
        ctx.is_tanh, ctx.dtype = is_tanh, weight.dtype
        return F.linear(normalized, narrow)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, linear, weight, mean, inverse_std = ctx.saved_tensors
        of_gate, of_linear, normalized = op.gated_norm_backward(
            grad @ weight, gate, linear, mean, inverse_std, ctx.is_tanh
        )
        of_weight = (grad.flatten(0, -2).T @ normalized.flatten(0, -2)).to(ctx.dtype)
        return of_gate, None if linear is None else of_linear, of_weight, None, None
