"""Mixes in plain PyTorch, with the roundings of what the kernels keep in a narrower dtype."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.dropout import dropout
from kernels.normalize import op as normalize


def depth_mix(representations: list[Tensor], alpha: Tensor) -> Tensor:
    """x_n = Σ_{m≤n} α_m·y_m of n + 1 tensors of one shape, alpha [n + 1]."""
    return torch.einsum("m,m...->...", alpha, torch.stack(representations))


def fused_mixes(
    first: Tensor,
    outputs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    alphas: Sequence[Tensor],
    seeds: Sequence[Tensor | None],
    dropout_prob: float,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, list[Tensor]]:
    """`kernels.depth_mix.FusedMixes`, from outputs that do not depend on h_n: x_M, and h_0 … h_M.

    Args:
        first: y_0 [R, D].
        outputs: out_1 … out_M, [R, D].
        biases: of the outputs, [D] or None.
        alphas: α_n [n + 1].
        seeds: [2] int32 or None.
        dropout_prob: probability of a zero.
        eps: LayerNorm's.
        dtype: to which all y_m but the newest and all h_n are rounded, and for ∂α the newest and ∂x_n, too; ∂x_n is
            made from the rounded h_n. In fp64 nothing is rounded.
    """
    x, older, normalized = first, [first], [normalize.normalize(first, eps, dtype)]
    for output, bias, alpha, seed in zip(outputs, biases, alphas, seeds, strict=True):
        added = output.to(first.dtype) if bias is None else output.to(first.dtype) + bias
        newest = x + dropout(added, seed, dropout_prob)
        rounded = [each.to(dtype).to(first.dtype) for each in older]
        x = _Mix.apply(alpha, dtype, *rounded, newest)
        older.append(newest)
        normalized.append(normalize.normalize(x, eps, dtype))
    return x, normalized


class _Mix(torch.autograd.Function):
    """`depth_mix`; ∂α is made from what is kept."""

    @staticmethod
    def forward(ctx: Any, alpha: Tensor, dtype: torch.dtype, *representations: Tensor) -> Tensor:
        ctx.save_for_backward(alpha, *representations)
        ctx.dtype = dtype
        return depth_mix(list(representations), alpha)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        alpha, *representations = ctx.saved_tensors
        kept = [tensor.to(ctx.dtype).to(grad.dtype) for tensor in (grad, *representations)]
        grad_alpha = torch.stack([(kept[0] * values).sum() for values in kept[1:]])
        return grad_alpha, None, *(weight * grad for weight in alpha)
