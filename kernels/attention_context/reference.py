"""Attention over materialized scores [H, B, T, T], differentiated by autograd (docs/model.md#attention)."""

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
