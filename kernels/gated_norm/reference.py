"""LayerNorm(linear · GELU(gate)) times a matrix by PyTorch's functions, differentiated by autograd."""

import torch.nn.functional as F
from torch import Tensor


def gated_norm(gate: Tensor, linear: Tensor | None, weight: Tensor, *, approximate: str, eps: float) -> Tensor:
    """See `kernels.gated_norm`."""
    return F.linear(normalized_product(gate, linear, approximate=approximate, eps=eps), weight)


def normalized_product(gate: Tensor, linear: Tensor | None, *, approximate: str, eps: float) -> Tensor:
    """LayerNorm(linear · GELU(gate)), [B, T, D]; arguments as for `kernels.gated_norm`."""
    if linear is None:
        linear, gate = gate.chunk(2, dim=-1)
    else:
        linear = linear.permute(1, 2, 0, 3).flatten(2)  # [H, B, T, d] to [B, T, D]
    product = linear * F.gelu(gate, approximate=approximate)
    return F.layer_norm(product, product.shape[-1:], eps=eps)
