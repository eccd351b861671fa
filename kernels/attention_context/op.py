"""The operation with its backward: matrix products by PyTorch, the softmax between them by eager.py or C++."""

from typing import Any

import torch
from torch import Tensor

from kernels.attention_context import cpp, eager
from kernels.backend import uses_cpp
from kernels.first_order import first_order


def attention_context(*arguments: Any) -> Tensor:
    """See `kernels.attention_context`: its arguments in order, the backend last."""
    return _AttentionContext.apply(*arguments)


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
        backend: str | None,
    ) -> Tensor:
        rows = query.shape[1:3]
        scores = query @ key.mT  # [H, B, T, T]
        by_query = (query.flatten(1, 2) @ position_key.mT).unflatten(1, rows)  # [H, B, T, P]
        by_key = (position_query @ key.flatten(1, 2).mT).unflatten(2, rows)  # [H, P, B, T]
        implementation = cpp if uses_cpp(scores, backend) else eager
        probabilities, dropped = implementation.attention_weights(
            scores, by_query, by_key, buckets, mask, seed, dropout_prob
        )
        ctx.save_for_backward(query, key, position_query, position_key, value, probabilities, buckets, seed)
        ctx.dropout_prob, ctx.backend = dropout_prob, backend
        return (probabilities if seed is None else dropped) @ value

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, position_query, position_key, value, probabilities, buckets, seed = ctx.saved_tensors
        implementation = cpp if uses_cpp(grad, ctx.backend) else eager
        of_scores, by_query, by_key, dropped = implementation.attention_weights_backward(
            grad @ value.mT, probabilities, buckets, position_key.shape[1], seed, ctx.dropout_prob
        )
        of_value = (probabilities if seed is None else dropped).mT @ grad
        # order operands so that each gradient has its input's layout
        rows = query.shape[1:3]
        by_query, by_key = by_query.flatten(1, 2), by_key.flatten(2, 3)  # [H, B·T, P] and [H, P, B·T]
        of_query = of_scores @ key + (by_query @ position_key).unflatten(1, rows)
        of_key = of_scores.mT @ query + (by_key.mT @ position_query).unflatten(1, rows)
        of_position_query = by_key @ key.flatten(1, 2)
        of_position_key = by_query.mT @ query.flatten(1, 2)
        return of_query, of_key, of_position_query, of_position_key, of_value, *[None] * 5
