"""LayerNorm as nearly everywhere in GPT-BERT: without scale and bias."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptbert.config import ModelConfig


def layer_norm(size: int, config: ModelConfig) -> nn.LayerNorm:
    """LayerNorm over `size` entries, not affine; the relative embedding has an affine one of its own."""
    return nn.LayerNorm(size, eps=config.layer_norm_eps, elementwise_affine=False)


class InputNorm(nn.Module):
    """`layer_norm` before a matrix product: under autocast its result has the product's two bytes.

    That result is all that both backwards need, and all that is kept. PyTorch's own keeps its input too, in four bytes.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eps = config.layer_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        """X [..., D] to the same shape, in autocast's dtype where that is on."""
        device = x.device.type
        if not torch.is_autocast_enabled(device):
            return F.layer_norm(x, x.shape[-1:], eps=self.eps)
        return _Normalise.apply(x, self.eps, torch.get_autocast_dtype(device))


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        centred = wide - wide.mean(dim=-1, keepdim=True)
        inverse_std = (centred.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
        normalised = (centred * inverse_std).to(dtype)
        ctx.save_for_backward(normalised, inverse_std)
        ctx.dtype = x.dtype
        return normalised

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        normalised, inverse_std = ctx.saved_tensors
        grad, normalised = grad.to(inverse_std.dtype), normalised.to(inverse_std.dtype)
        along = (grad * normalised).mean(dim=-1, keepdim=True)
        grad = inverse_std * (grad - grad.mean(dim=-1, keepdim=True) - normalised * along)
        return grad.to(ctx.dtype), None, None
