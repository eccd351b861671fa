"""Self-attention with disentangled relative positions (spec.md §1), and what is its own in it: the position scores.

Letters of shapes: B rows, T positions, D hidden, H heads, d = D/H, S bucket size, P = 2S−1 distinct position vectors.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptbert.bucket_sums import bucket_sums
from gptbert.config import ModelConfig
from gptbert.dropout import Dropout, dropout
from gptbert.norm import InputNorm

SEEDS = 3  # of dropout, for each attention


class Attention(nn.Module):
    """Attention with a gated output, and the residual connection around it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden_size = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.scale = 1 / math.sqrt(3 * (hidden_size // self.num_heads))
        self.query_key = nn.Linear(hidden_size, 2 * hidden_size)
        self.value_gate = nn.Linear(hidden_size, 2 * hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size)
        self.input_norm = InputNorm(config)
        self.context_norm = InputNorm(config)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.attention_dropout_prob = config.attention_probs_dropout_prob

    def forward(
        self, hidden_states: Tensor, relative: Tensor, buckets: Tensor, mask: Tensor, seeds: Tensor | None
    ) -> Tensor:
        """X [B, T, D] to x + attention(x).

        Args:
            hidden_states: [B, T, D].
            relative: [P, D], normalised position vectors.
            buckets: [T, T], β(i, j).
            mask: [B, 1, T, T] bool, True where query i may see key j.
            seeds: [SEEDS, 2] of dropout, or None.
        """
        relative_seed, probability_seed, output_seed = (None,) * SEEDS if seeds is None else seeds.unbind()
        normalised = self.input_norm(hidden_states)
        query, key = self.query_key(normalised).chunk(2, dim=-1)
        value, gate = self.value_gate(normalised).chunk(2, dim=-1)
        position_query, position_key = self.query_key(self.dropout(relative, relative_seed)).chunk(2, dim=-1)
        query, position_query = query * self.scale, position_query * self.scale
        query, key, value, position_query, position_key = (
            self.heads(x) for x in (query, key, value, position_query, position_key)
        )  # [B, H, T, d] and [H, P, d]
        context = AttentionContext.apply(
            query @ key.transpose(-2, -1),
            query @ position_key.transpose(-2, -1),  # [B, H, T of i, P]
            key @ position_query.transpose(-2, -1),  # [B, H, T of j, P]
            value,
            buckets,
            mask,
            probability_seed,
            self.attention_dropout_prob if self.training else 0.0,
        )  # [B, H, T, d]
        context = context.transpose(1, 2).flatten(2)  # [B, T, D]
        output = self.output(self.context_norm(context * F.gelu(gate)))
        return hidden_states + self.dropout(output, output_seed)

    def heads(self, x: Tensor) -> Tensor:
        """[..., T, D] to [..., H, T, d]."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)


class AttentionContext(torch.autograd.Function):
    """Mean of the values under a softmax of content and position scores, with dropout of the probabilities.

    A query that sees no key gives zeros. The position scores come once per distinct position vector, and are gathered;
    their gradients are sums over the positions of a bucket, see `bucket_sums`. Of all that has [B, H, T, T] entries
    only the probabilities are kept for the backward, which draws the dropout's mask again.
    """

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
        """[B, H, T, d].

        Args:
            ctx: of autograd.
            scores: [B, H, T, T], of query i and key j.
            by_query: [B, H, T, P], of query i and each position vector.
            by_key: [B, H, T, P], of key j and each position vector.
            value: [B, H, T, d].
            buckets: [T, T] int64, β(i, j), a function of i − j.
            mask: [B, 1, T, T] bool, True where query i may see key j.
            seed: of dropout, or None.
            dropout_prob: of a zero.
        """
        wide = torch.promote_types(scores.dtype, torch.float32)
        of_query = by_query.gather(-1, buckets.expand_as(scores))
        of_key = by_key.gather(-1, buckets.T.expand_as(scores)).transpose(-2, -1)
        total = scores.to(wide) + of_query.to(wide) + of_key.to(wide)
        total = total.masked_fill(~mask, torch.finfo(wide).min)
        probabilities = total.softmax(dim=-1).masked_fill(~mask, 0.0).to(scores.dtype)
        ctx.save_for_backward(probabilities, value, buckets, seed)
        ctx.dropout_prob, ctx.num_buckets = dropout_prob, by_query.shape[-1]
        return dropout(probabilities, seed, dropout_prob) @ value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the three scores and of the values."""
        probabilities, value, buckets, seed = ctx.saved_tensors
        grad_value = dropout(probabilities, seed, ctx.dropout_prob).transpose(-2, -1) @ grad
        wide = torch.promote_types(grad.dtype, torch.float32)
        grad_probabilities = dropout((grad @ value.transpose(-2, -1)).to(wide), seed, ctx.dropout_prob)
        weighted = grad_probabilities * probabilities.to(wide)
        grad_scores = (weighted - probabilities.to(wide) * weighted.sum(dim=-1, keepdim=True)).to(grad.dtype)
        by_query, by_key = bucket_sums(grad_scores, buckets, ctx.num_buckets)
        return grad_scores, by_query, by_key, grad_value, None, None, None, None
