"""LayerNorm of a gated product, then a matrix product: the end of both sub-layers. The public operation."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from kernels.backend import uses_cpp
from kernels.gated_norm import eager, op


def gated_norm(
    gate: Tensor,
    linear: Tensor | None,
    weight: Tensor,
    *,
    approximate: Literal["none", "tanh"],
    eps: float,
    backend: str | None = None,
) -> Tensor:
    """LayerNorm(linear · GELU(gate)) times a matrix.

    Args:
        gate: [B, T, D]; without `linear` [B, T, 2D], linear and gate concatenated.
        linear: [H, B, T, d], D = H·d, or None.
        weight: [E, D].
        approximate: as of torch.nn.functional.gelu.
        eps: of LayerNorm.
        backend: see `kernels.backend.choose_backend`; "cpp" has kernels for bf16.

    Returns:
        [B, T, E].
    """
    if uses_cpp(gate, backend):
        return op.gated_norm(gate, linear, weight, approximate, eps)
    if linear is None:
        linear, gate = gate.chunk(2, dim=-1)
    else:
        linear = linear.permute(1, 2, 0, 3).flatten(2)  # [B, T, D]
    return F.linear(eager.gated_norm(linear, gate, approximate, eps), weight)
