"""Sums over rows, the gradient of a bias: the public operations."""

from typing import Any

import torch
from torch import Tensor

from kernels import cpp


def add_bias(product: Tensor, bias: Tensor) -> Tensor:
    """The rest of a linear layer, for compiled code to fuse into the next pass; a library copies it to all rows first.

    Args:
        product: [..., D].
        bias: [D].

    Returns:
        [..., D], in the type of the product.
    """
    return _AddBias.apply(product, bias) if cpp.serves(product) else product + bias.to(product.dtype)


def _sums(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], dtype=torch.float32)


@cpp.operation(_sums)
def column_sums(x: Tensor) -> Tensor:
    """[N, D] in bf16 to [D] in fp32; compiled code, which fuses the sum with what makes `x`, would make it twice."""
    x = x if x.stride(1) == 1 else x.contiguous()
    sums = _sums(x)
    cpp.call("column_sums", (x, sums, *x.shape, x.stride(0)))
    return sums


class _AddBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, product: Tensor, bias: Tensor) -> Tensor:
        ctx.dtype = bias.dtype
        return product + bias.to(product.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        # rounded as PyTorch's own is, so that weights that travel in two bytes, as FSDP's do, learn the same
        return grad, column_sums(grad.flatten(0, -2)).to(grad.dtype).to(ctx.dtype)
