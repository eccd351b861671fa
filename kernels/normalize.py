"""LayerNorm without scale and bias before a matrix product, as nearly everywhere in GPT-BERT."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def normalize(x: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension; under autocast the result has the product's two bytes.

    There that result is all that both backwards need, and all that is kept. PyTorch's own keeps its input too, in four
    bytes.

    Args:
        x: [..., D].
        eps: added to the variance.

    Returns:
        [..., D], in autocast's dtype where that is on.
    """
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return F.layer_norm(x, x.shape[-1:], eps=eps)
    return _Normalize.apply(x, eps, torch.get_autocast_dtype(device))


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        centered = wide - wide.mean(dim=-1, keepdim=True)
        inverse_std = (centered.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
        normalized = (centered * inverse_std).to(dtype)
        ctx.save_for_backward(normalized, inverse_std)
        ctx.dtype = x.dtype
        return normalized

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        normalized, inverse_std = ctx.saved_tensors
        grad, normalized = grad.to(inverse_std.dtype), normalized.to(inverse_std.dtype)
        along = (grad * normalized).mean(dim=-1, keepdim=True)
        grad = inverse_std * (grad - grad.mean(dim=-1, keepdim=True) - normalized * along)
        return grad.to(ctx.dtype), None, None
