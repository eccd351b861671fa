"""Attention and the gated norm behind it, from one projection: queries, keys, values and gates side by side.

The gradient of the projection is one matrix as well, whose quarters the kernels write: one product follows for its
weight and one for its input, and nothing is copied together.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention_context.fused import DistanceTables, contiguous, empty_table
from kernels.backend import triton_kernel
from kernels.first_order import first_order
from kernels.linear import Packed, PackedGradient


def gated_attention(
    projection: Tensor,
    position: Tensor,
    tables: DistanceTables,
    document_ids: Tensor,
    is_causal: Tensor,
    seed: Tensor | None,
    dropout_prob: float,
    weight: Packed,
    *,
    scale: float,
    num_heads: int,
    eps: float,
) -> Tensor:
    """LayerNorm(attention · GELU(gate)) times a matrix; the exact GELU.

    For sizes of which `is_fused` of attention_context and of gated_norm are true.

    Args:
        projection: [B, T, 4D], queries (not scaled), keys, values and gates.
        position: [P, 2D], position queries (not scaled) and position keys.
        tables: see `kernels.attention_context.fused_attention`, as for all that follow.
        document_ids: [B, T] int32.
        is_causal: [B] bool.
        seed: [2] int32, of dropout, or None.
        dropout_prob: probability of a zero.
        weight: [E, D], one parameter with its copy in the dtype of the projection.
        scale: factor of the scores.
        num_heads: H.
        eps: of LayerNorm.

    Returns:
        [B, T, E].
    """
    rows = (*tables, document_ids, is_causal, seed if dropout_prob else None)
    settings = (dropout_prob, scale, num_heads, eps)
    packed = (weight.narrow, weight.gradient, weight.overwrites, *weight.parts)
    return _GatedAttention.apply(projection, position, *packed, *rows, *settings)


class _GatedAttention(torch.autograd.Function):
    """As in `kernels.gated_norm`, the normalized product is recomputed in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        projection: Tensor,
        position: Tensor,
        narrow: Tensor,
        memory: Tensor | None,
        overwrites: bool,
        weight: Tensor,
        buckets: Tensor,
        bucket_rows: Tensor,
        variant: str,
        document_ids: Tensor,
        is_causal: Tensor,
        seed: Tensor | None,
        *settings: float,
    ) -> Tensor:
        rows = (document_ids, is_causal, seed)
        normalized, *kept = forward(projection, position, buckets, variant, *rows, *settings)
        ctx.save_for_backward(narrow, projection, position, buckets, bucket_rows, *rows, *kept)
        ctx.variant, ctx.settings = variant, settings[:-1]
        ctx.packed = PackedGradient(memory, [weight], overwrites=overwrites)
        return F.linear(normalized, narrow)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        narrow, *tensors = ctx.saved_tensors
        inputs = (grad @ narrow, *tensors[:4], ctx.variant, *tensors[4:])
        of_projection, of_position, normalized = backward(*inputs, *ctx.settings)
        of_weight = ctx.packed.of_weight(grad.flatten(0, -2), normalized.flatten(0, -2))
        return of_projection, of_position, *[None] * 3, *of_weight, *[None] * 10


@torch.library.custom_op("kernels::gated_attention", mutates_args=())
def forward(
    projection: Tensor,
    position: Tensor,
    buckets: Tensor,
    variant: str,
    document_ids: Tensor,
    is_causal: Tensor,
    seed: Tensor | None,
    dropout_prob: float,
    scale: float,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The normalized product [B, T, D]; for the backward: attention's three results, mean and 1/σ.

    Those are the output [B, T, D], its log-sum-exp [H, B, T], the table of position scores, and two tensors [B·T] in
    fp32.
    """
    query, key, value, gate = _quarters(projection)
    rows = (document_ids, is_causal, seed, dropout_prob, scale, num_heads)
    context, lse, table = triton_kernel("attention_context").forward(
        query, key, value, position, buckets, variant, *rows
    )
    normalized, mean, inverse_std = triton_kernel("gated_norm").forward(
        context.flatten(0, 1), gate.flatten(0, 1), is_tanh=False, eps=eps
    )
    return normalized.view(context.shape), context, lse, table, mean, inverse_std


@forward.register_fake
def _(projection, position, buckets, variant, document_ids, is_causal, seed, dropout_prob, scale, num_heads, eps):
    del document_ids, is_causal, seed, dropout_prob, scale, eps
    rows, length, width = projection.shape
    results = (projection.new_empty(rows, length, width // 4) for _ in range(2))
    lse = projection.new_empty(num_heads, rows, length, dtype=torch.float32)
    table = empty_table(projection, position, buckets, variant, num_heads)
    statistics = (projection.new_empty(rows * length, dtype=torch.float32) for _ in range(2))
    return *results, lse, table, *statistics


@torch.library.custom_op("kernels::gated_attention_backward", mutates_args=())
def backward(
    grad: Tensor,
    projection: Tensor,
    position: Tensor,
    buckets: Tensor,
    bucket_rows: Tensor,
    variant: str,
    document_ids: Tensor,
    is_causal: Tensor,
    seed: Tensor | None,
    context: Tensor,
    lse: Tensor,
    table: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    dropout_prob: float,
    scale: float,
    num_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of projection [B, T, 4D] and position [P, 2D], and the normalized product [B, T, D], recomputed."""
    of_projection = torch.empty_like(projection, memory_format=torch.contiguous_format)
    *of_tensors, of_gate = of_projection.chunk(4, dim=-1)
    *tensors, gate = _quarters(projection)
    of_context, normalized = torch.empty_like(context), torch.empty_like(context)
    triton_kernel("gated_norm").backward(
        grad.flatten(0, 1).contiguous(), context.flatten(0, 1), gate.flatten(0, 1), mean, inverse_std,
        of_context.flatten(0, 1), of_gate.flatten(0, 1), normalized.flatten(0, 1), is_tanh=False,
    )  # fmt: skip
    of_position = triton_kernel("attention_context").backward(
        of_context, *tensors, contiguous(position), buckets, bucket_rows, variant, document_ids, is_causal, seed,
        context, lse, table, dropout_prob, scale, num_heads, tuple(of_tensors),
    )  # fmt: skip
    return of_projection, of_position.to(position.dtype), normalized


@backward.register_fake
def _(grad, projection, position, *rest):  # noqa: ANN002
    del rest
    return tuple(x.new_empty(x.shape) for x in (projection, position, grad))


def _quarters(projection: Tensor) -> tuple[Tensor, ...]:
    return contiguous(projection).chunk(4, dim=-1)
