"""Attention with content and position scores, up to the weighted values: the public operation."""

import torch
from torch import Tensor

from kernels.attention_context import op
from kernels.attention_context.fused import fused_attention
from kernels.attention_context.gated import gated_attention

__all__ = ["attention_context", "fused_attention", "gated_attention"]


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
    *,
    backend: str | None = None,
) -> Tensor:
    """Values weighted by a softmax of content and position scores, with dropout of the probabilities.

    The score of query i and key j is q_i·k_j + q_i·pk_β(i,j) + pq_β(i,j)·k_j (docs/model.md#attention). A query that
    sees no key gives zeros. Position scores are computed once per position vector, one product per head for all rows,
    and gathered; their gradients are sums over buckets. The only [H, B, T, T] tensor saved for the backward is the
    probabilities; the dropout mask is drawn again.

    Args:
        query: [H, B, T, d], scaled.
        key: [H, B, T, d].
        position_query: [H, P, d], scaled.
        position_key: [H, P, d].
        value: [H, B, T, d].
        buckets: [T, T] int64, β(i, j) in 0 … P − 1, a function of i − j.
        mask: [B, T, T] bool, True where query i may see key j.
        seed: [2] int32, of dropout, or None.
        dropout_prob: probability of a zero.
        backend: see `kernels.backend.choose_backend`; "cpp" has kernels for bf16.

    Returns:
        [H, B, T, d]; under autocast in its dtype.

    Raises:
        ValueError: the mask, the buckets, the seed or the probability are of another kind.
    """
    if mask.dtype != torch.bool or buckets.dtype != torch.int64:
        raise ValueError(f"mask, buckets: {mask.dtype}, {buckets.dtype}; expected torch.bool, torch.int64")
    if torch.is_autocast_enabled(query.device.type):  # here, as a backward runs without it
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, position_query, position_key, value = (
            tensor.to(dtype) for tensor in (query, key, position_query, position_key, value)
        )
    seed = seed if dropout_prob else None
    tensors = (query, key, position_query, position_key, value, buckets, mask, seed)
    return op.attention_context(*tensors, dropout_prob, backend)
