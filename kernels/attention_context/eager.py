"""Softmax of content and position scores with dropout, and its backward, in PyTorch (docs/model.md#attention).

Shapes: H heads, B rows, T positions, P distinct position vectors.
"""

import torch
from torch import Tensor

from kernels.attention_context.bucket_sums import bucket_sums
from kernels.dropout import dropout


def attention_weights(
    scores: Tensor,
    by_query: Tensor,
    by_key: Tensor,
    buckets: Tensor,
    mask: Tensor,
    seed: Tensor | None,
    dropout_prob: float,
) -> tuple[Tensor, Tensor]:
    """Softmax of scores [H, B, T, T], by_query [H, B, T, P] and by_key [H, P, B, T], gathered by bucket.

    Arguments as in `kernels.attention_context`; returns the probabilities before and after dropout, [H, B, T, T] each.
    """
    wide = torch.promote_types(scores.dtype, torch.float32)
    of_query = by_query.gather(-1, buckets.expand_as(scores))
    of_key = by_key.transpose(1, 2).gather(-2, buckets.expand_as(scores))
    total = scores.to(wide) + of_query.to(wide) + of_key.to(wide)
    total = total.masked_fill(~mask, torch.finfo(wide).min)
    probabilities = total.softmax(dim=-1).masked_fill(~mask, 0.0).to(scores.dtype)
    return probabilities, dropout(probabilities, seed, dropout_prob)


def attention_weights_backward(
    grad: Tensor,
    probabilities: Tensor,
    buckets: Tensor,
    num_buckets: int,
    seed: Tensor | None,
    dropout_prob: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the three scores, and the probabilities after dropout, recomputed.

    Args:
        grad: [H, B, T, T], of the probabilities after dropout.
        probabilities: [H, B, T, T], before it.
        buckets: [T, T] int64, β(i, j), a function of i − j.
        num_buckets: P.
        seed: of dropout, or None.
        dropout_prob: probability of a zero.

    Returns:
        Gradients of scores [H, B, T, T], by_query [H, B, T, P] and by_key [H, P, B, T]; the probabilities [H, B, T, T].
    """
    wide = torch.promote_types(grad.dtype, torch.float32)
    weighted = dropout(grad.to(wide), seed, dropout_prob) * probabilities.to(wide)
    grad_scores = (weighted - probabilities.to(wide) * weighted.sum(dim=-1, keepdim=True)).to(grad.dtype)
    by_query, by_key = bucket_sums(grad_scores, buckets, num_buckets)
    return grad_scores, by_query, by_key.permute(0, 3, 1, 2), dropout(probabilities, seed, dropout_prob)
