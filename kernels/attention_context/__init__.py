"""Attention's mean of values under content and position scores: the public operation."""

from typing import Any

import torch
from torch import Tensor

from kernels import cpp
from kernels.attention_context import op, reference


def attention_context(
    query: Tensor,
    key: Tensor,
    position_query: Tensor,
    position_key: Tensor,
    value: Tensor,
    buckets: Tensor,
    mask: Tensor,
    seed: Tensor | None,
    dropout_prob: float,
) -> Tensor:
    """Mean of the values under a softmax of content and position scores, with dropout of the probabilities.

    Query i and key j have the score q_i·k_j + q_i·pk_β(i,j) + pq_β(i,j)·k_j (docs/model.md#attention). A query that
    sees no key gives zeros. Position scores are computed once per position vector, for all rows in one product a head,
    and gathered; their gradients are sums over the positions of a bucket. Of all that has [H, B, T, T] entries only the
    probabilities are kept for the backward, which draws the dropout's mask again.

    Args:
        query: [H, B, T, d], scaled.
        key: [H, B, T, d].
        position_query: [H, P, d], scaled.
        position_key: [H, P, d].
        value: [H, B, T, d].
        buckets: [T, T] int64, β(i, j) in 0 … P − 1, a function of i − j.
        mask: [B, T, T] bool, True where query i may see key j.
        seed: [2] int32 of dropout, or None.
        dropout_prob: of a zero.

    Returns:
        [H, B, T, d].
    """
    seed = seed if dropout_prob else None
    return _AttentionContext.apply(query, key, position_query, position_key, value, buckets, mask, seed, dropout_prob)


class _AttentionContext(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        position_query: Tensor,
        position_key: Tensor,
        value: Tensor,
        buckets: Tensor,
        mask: Tensor,
        seed: Tensor | None,
        dropout_prob: float,
    ) -> Tensor:
        rows = query.shape[1:3]
        scores = query @ key.mT  # [H, B, T, T]
        by_query = (query.flatten(1, 2) @ position_key.mT).unflatten(1, rows)  # [H, B, T, P]
        by_key = (position_query @ key.flatten(1, 2).mT).unflatten(2, rows)  # [H, P, B, T]
        weights = op.attention_weights if cpp.serves(scores) else reference.attention_weights
        probabilities, dropped = weights(scores, by_query, by_key, buckets, mask, seed, dropout_prob)
        ctx.save_for_backward(query, key, position_query, position_key, value, probabilities, buckets, seed)
        ctx.dropout_prob = dropout_prob
        return (probabilities if seed is None else dropped) @ value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, position_query, position_key, value, probabilities, buckets, seed = ctx.saved_tensors
        backward = op.attention_weights_backward if cpp.serves(grad) else reference.attention_weights_backward
        of_scores, by_query, by_key, dropped = backward(
            grad @ value.mT, probabilities, buckets, position_key.shape[1], seed, ctx.dropout_prob
        )
        of_value = (probabilities if seed is None else dropped).mT @ grad
        # each product in the order that gives its result the layout of what it is the gradient of
        rows = query.shape[1:3]
        by_query, by_key = by_query.flatten(1, 2), by_key.flatten(2, 3)  # [H, B·T, P] and [H, P, B·T]
        of_query = of_scores @ key + (by_query @ position_key).unflatten(1, rows)
        of_key = of_scores.mT @ query + (by_key.mT @ position_query).unflatten(1, rows)
        of_position_query = by_key @ key.flatten(1, 2)
        of_position_key = by_query.mT @ query.flatten(1, 2)
        return of_query, of_key, of_position_query, of_position_key, of_value, None, None, None, None
