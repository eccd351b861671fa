"""Mixes in plain PyTorch, differentiated by autograd."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dropout import dropout


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
        dtype: to which all y_m but the newest and all h_n are rounded.
    """
    x, older, normalized = first, [first], [_normalized(first, eps, dtype)]
    for output, bias, alpha, seed in zip(outputs, biases, alphas, seeds, strict=True):
        added = output.to(first.dtype) if bias is None else output.to(first.dtype) + bias
        newest = x + dropout(added, seed, dropout_prob)
        x = depth_mix([*(each.to(dtype).to(first.dtype) for each in older), newest], alpha)
        older.append(newest)
        normalized.append(_normalized(x, eps, dtype))
    return x, normalized


def _normalized(x: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=eps).to(dtype)
