"""Attention's mean of values under content and position scores: the public operation."""

from typing import Any

import torch
from torch import Tensor

from kernels import cpp
from kernels.attention_context import op, reference


def attention_context(
    scores: Tensor,
    by_query: Tensor,
    by_key: Tensor,
    value: Tensor,
    buckets: Tensor,
    mask: Tensor,
    seed: Tensor | None,
    dropout_prob: float,
) -> Tensor:
    """Mean of the values under a softmax of content and position scores, with dropout of the probabilities.

    A query that sees no key gives zeros. The position scores come once per distinct position vector, and are gathered;
    their gradients are sums over the positions of a bucket. Of all that has [H, B, T, T] entries only the probabilities
    are kept for the backward, which draws the dropout's mask again.

    Args:
        scores: [H, B, T, T], of query i and key j.
        by_query: [H, B, T, P], of query i and each position vector.
        by_key: [H, P, B, T], of each position vector and key j.
        value: [H, B, T, d].
        buckets: [T, T] int64, β(i, j), a function of i − j.
        mask: [B, T, T] bool, True where query i may see key j.
        seed: [2] int32 of dropout, or None.
        dropout_prob: of a zero.

    Returns:
        [H, B, T, d].
    """
    return _AttentionContext.apply(
        scores, by_query, by_key, value, buckets, mask, seed if dropout_prob else None, dropout_prob
    )


class _AttentionContext(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        scores: Tensor,
        by_query: Tensor,
        by_key: Tensor,
        value: Tensor,
        buckets: Tensor,
        mask: Tensor,
        seed: Tensor | None,
        dropout_prob: float,
    ) -> Tensor:
        weights = op.attention_weights if cpp.serve(scores) else reference.attention_weights
        probabilities, dropped = weights(scores, by_query, by_key, buckets, mask, seed, dropout_prob)
        ctx.save_for_backward(probabilities, value, buckets, seed)
        ctx.dropout_prob, ctx.num_buckets = dropout_prob, by_query.shape[-1]
        return (probabilities if seed is None else dropped) @ value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        probabilities, value, buckets, seed = ctx.saved_tensors
        backward = op.attention_weights_backward if cpp.serve(grad) else reference.attention_weights_backward
        of_dropped = grad @ value.transpose(-2, -1)
        grad_scores, by_query, by_key, dropped = backward(
            of_dropped, probabilities, buckets, ctx.num_buckets, seed, ctx.dropout_prob
        )
        grad_value = (probabilities if seed is None else dropped).transpose(-2, -1) @ grad
        return grad_scores, by_query, by_key, grad_value, None, None, None, None
