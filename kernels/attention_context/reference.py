"""Attention over materialized scores [H, B, T, T], differentiated by autograd (docs/model.md#attention)."""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.dropout import dropout


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
    """See `kernels.attention_context`."""
    content = torch.einsum("hbid,hbjd->hbij", query, key)
    by_query = torch.einsum("hbid,hijd->hbij", query, position_key[:, buckets])  # q_i · pk_β(i,j)
    by_key = torch.einsum("hijd,hbjd->hbij", position_query[:, buckets], key)  # pq_β(i,j) · k_j
    scores = (content + by_query + by_key).masked_fill(~mask, -torch.inf)
    probabilities = scores.softmax(dim=-1).nan_to_num(0.0)  # a query that sees no key: NaN to 0
    return dropout(probabilities, seed, dropout_prob) @ value


def fused_attention(
    query: Tensor,
    key: Tensor,
    position_query: Tensor,
    position_key: Tensor,
    value: Tensor,
    buckets: Tensor,
    document_ids: Tensor,
    is_causal: Tensor,
    seed: Tensor | None,
    dropout_prob: float,
    *,
    scale: float,
    num_heads: int,
    attention: Callable[..., Tensor] = attention_context,
) -> Tensor:
    """See `kernels.attention_context.fused_attention`; `buckets` [2T − 1] are those of its tables.

    `attention` takes what `attention_context` does, which holds position vectors of all pairs, [H, T, T, d]: for long
    rows another implementation fits into memory.
    """
    index = torch.arange(query.shape[1], device=query.device)
    matrix = buckets[index[:, None] - index + len(index) - 1]  # [T, T]
    mask = (document_ids[:, :, None] == document_ids[:, None, :]) & (document_ids >= 0)[:, None, :]
    mask = torch.where(is_causal[:, None, None], mask.tril(), mask)
    query, key, position_query, position_key, value = (
        tensor.unflatten(-1, (num_heads, -1)).movedim(-2, 0)  # [..., D] to [H, ..., d]
        for tensor in (query * scale, key, position_query * scale, position_key, value)
    )
    return attention(query, key, position_query, position_key, value, matrix, mask, seed, dropout_prob)
