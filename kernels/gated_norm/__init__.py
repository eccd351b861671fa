"""LayerNorm of a gated product, then a matrix product: the end of both sub-layers. The public operation."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from kernels.backend import uses_cpp
from kernels.gated_norm import eager, op
from kernels.gated_norm.fused import is_fused
from kernels.linear import Packed
from kernels.linear import linear as linear_layer

__all__ = ["gated_norm", "is_fused"]


def gated_norm(
    gate: Tensor,
    linear: Tensor | None,
    weight: Tensor | Packed,
    *,
    approximate: Literal["none", "tanh"],
    eps: float,
    backend: str | None = None,
) -> Tensor:
    """LayerNorm(linear · GELU(gate)) times a matrix.

    Args:
        gate: [B, T, D]; without `linear` [B, T, 2D], linear and gate concatenated.
        linear: [H, B, T, d], D = H·d, or None.
        weight: [E, D]; or one parameter with its copy in the gate's dtype, which the Triton kernels need.
        approximate: as of torch.nn.functional.gelu.
        eps: of LayerNorm.
        backend: see `kernels.backend.choose_backend`; "cpp" has kernels for bf16, "triton" for what `is_fused` takes.

    Returns:
        [B, T, E].
    """
    if isinstance(weight, Packed):
        size = weight.narrow.shape[1]
        if is_fused(gate.device, gate.dtype, size, backend):
            return op.fused_gated_norm(gate, linear, weight, approximate, eps)
    elif uses_cpp(gate, backend):
        return op.gated_norm(gate, None if linear is None else linear.to(gate.dtype), weight, approximate, eps)
    if linear is None:
        linear, gate = gate.chunk(2, dim=-1)
    else:
        linear = linear.permute(1, 2, 0, 3).flatten(2)  # [B, T, D]
    normalized = eager.gated_norm(linear, gate, approximate, eps)
    if isinstance(weight, Packed):
        return linear_layer(normalized.to(weight.narrow.dtype), weight)
    return F.linear(normalized, weight)
