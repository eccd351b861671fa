"""The operation with its backward by the C++ kernel."""

from typing import Any

import torch
from torch import Tensor

from kernels.add_bias.cpp import column_sums
from kernels.first_order import first_order


def add_bias(product: Tensor, bias: Tensor) -> Tensor:
    """See `kernels.add_bias`; the product is bf16."""
    return _AddBias.apply(product, bias)


class _AddBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, product: Tensor, bias: Tensor) -> Tensor:
        ctx.dtype = bias.dtype
        return product + bias.to(product.dtype)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        # rounded to the output's dtype like PyTorch's gradient, so that training with FSDP's bf16 weights is the same
        return grad, column_sums(grad.reshape(-1, grad.shape[-1])).to(grad.dtype).to(ctx.dtype)
