"""The operation under autocast; it saves its result, not its input, for the backward."""

from typing import Any

import torch
from torch import Tensor

from kernels.first_order import first_order


def normalize(x: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """See `kernels.normalize`; the result has `dtype`."""
    return _Normalize.apply(x, eps, dtype)


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
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        normalized, inverse_std = ctx.saved_tensors
        grad, normalized = grad.to(inverse_std.dtype), normalized.to(inverse_std.dtype)
        along = (grad * normalized).mean(dim=-1, keepdim=True)
        grad = inverse_std * (grad - grad.mean(dim=-1, keepdim=True) - normalized * along)
        return grad.to(ctx.dtype), None, None
