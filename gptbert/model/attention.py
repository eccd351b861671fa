"""Self-attention with disentangled relative positions (docs/model.md#attention).

Letters of shapes: B rows, T positions, D hidden, H heads, d = D/H, S bucket size, P = 2S−1 distinct position vectors.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptbert.config import ModelConfig
from gptbert.model.compilation import any_number_of_rows
from gptbert.model.dropout import Dropout
from gptbert.model.key_value_cache import KeyValueCache, next_context
from gptbert.model.norm import InputNorm
from kernels.add_bias import add_bias
from kernels.attention_context import attention_context, fused_attention, gated_attention
from kernels.attention_context.fused import DistanceTables
from kernels.gated_norm import gated_norm
from kernels.gated_norm import is_fused as is_gate_fused
from kernels.linear import Packed, linear_and_first

SEEDS = 3  # of dropout, per attention


class Visibility(NamedTuple):
    """Which positions attend to which, and in which bucket of distances; the same for all layers.

    In one of three forms: for all pairs, `mask` and `buckets`, with or without an empty `cache`; for fused attention,
    `document_ids`, `is_causal` and `tables`; for one further position, which sees all, `cache` and `buckets` [K].

    Attributes:
        mask: [B, T, T] bool, True where query i may see key j.
        buckets: [T, T], β(i, j), or [K].
        document_ids: [B, T] int32.
        is_causal: [B] bool.
        tables: β by distance.
        cache: has the earlier positions, and takes these.
    """

    mask: Tensor | None = None
    buckets: Tensor | None = None
    document_ids: Tensor | None = None
    is_causal: Tensor | None = None
    tables: DistanceTables | None = None
    cache: KeyValueCache | None = None

    def of_any_number_of_rows(self) -> "Visibility":
        """Itself, with the number of rows marked as dynamic for torch.compile."""
        for tensor in (self.mask, self.document_ids, self.is_causal):
            if tensor is not None:
                any_number_of_rows(tensor)
        return self


class AttentionWeights(NamedTuple):
    """Parameters of fused attention, with copies in the products' dtype.

    Attributes:
        projection: of queries, keys, values and gates, [4D, D]: one product.
        bias: its bias, [4D].
        output: [D, D].
    """

    projection: Packed
    bias: Packed
    output: Packed


class Attention(nn.Module):
    """Attention with a gated output and residual connection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden_size = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.scale = 1 / math.sqrt(3 * (hidden_size // self.num_heads))
        self.eps = config.layer_norm_eps
        self.query_key = nn.Linear(hidden_size, 2 * hidden_size)
        self.value_gate = nn.Linear(hidden_size, 2 * hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size)
        self.input_norm = InputNorm(config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.attention_dropout_prob = config.attention_probs_dropout_prob

    def forward(
        self,
        hidden_states: Tensor,
        relative: Tensor,
        visibility: Visibility,
        seeds: Tensor | Sequence[Tensor | None] | None,
        weights: AttentionWeights | None = None,
        *,
        product_only: bool = False,
    ) -> Tensor:
        """Attention with its residual connection, [B, T, D] to [B, T, D].

        Args:
            hidden_states: [B, T, D].
            relative: [P, D] or more rows, normalized position vectors.
            visibility: of all rows.
            seeds: SEEDS of dropout, [2] each or None, or all in one tensor; in the order of use. The first, of
                `relative`, is None if its elements have been dropped.
            weights: from `pack`, for fused attention; None: packed here.
            product_only: `hidden_states` are normalized already, and the result is the product with the output matrix
                alone: the mixes add bias, dropout and residual (`kernels.depth_mix.FusedMixes`).
        """
        relative_seed, probability_seed, output_seed = (None,) * SEEDS if seeds is None else seeds
        normalized = hidden_states if product_only else self.input_norm(hidden_states)
        relative = self.dropout(relative, relative_seed)
        dropout = (probability_seed, self.attention_dropout_prob if self.training else 0.0)
        if visibility.tables is None:
            output = self._eager_product(normalized, relative, visibility, *dropout)
        else:
            weights = self.pack(normalized.dtype) if weights is None else weights
            output = self._fused_product(normalized, relative, visibility, *dropout, weights)
        if product_only:
            return output
        return hidden_states + self.dropout(add_bias(output, self.output.bias), output_seed)

    def _eager_product(
        self, normalized: Tensor, relative: Tensor, visibility: Visibility, seed: Tensor | None, dropout_prob: float
    ) -> Tensor:
        """The product with the output matrix, from scores [H, B, T, T]."""
        # cast to bf16 once, so both uses' gradients are summed in bf16 before the cast back to fp32
        weight, bias = (param.to(normalized.dtype) for param in (self.query_key.weight, self.query_key.bias))
        query, key = add_bias(F.linear(normalized, weight), bias).chunk(2, dim=-1)
        value_gate = F.linear(normalized, self.value_gate.weight)
        value, gate = add_bias(value_gate, self.value_gate.bias).chunk(2, dim=-1)
        query, key, value = self.heads(query * self.scale), self.heads(key), self.heads(value)  # [H, B, T, d]
        cache = None if visibility.cache is None else visibility.cache.of(self)
        if cache is None or cache.positions is None:
            position_query, position_key = add_bias(F.linear(relative, weight), bias).chunk(2, dim=-1)
            positions = self.heads(position_query * self.scale), self.heads(position_key)  # [H, P, d]
        else:
            positions = cache.positions
        by_key = None
        if cache is not None:
            key, value, by_key = cache.append(key, value, positions)  # of all K positions
        mask: Any = visibility.mask
        buckets: Any = visibility.buckets
        if mask is None and by_key is not None:  # a further position, which sees all
            context = next_context(query, key, by_key, positions[1], value, buckets)
        else:
            context = attention_context(
                query, key, *positions, value, buckets, mask, seed, dropout_prob
            )  # [H, B, T, d]
        return gated_norm(gate, context, self.output.weight, approximate="none", eps=self.eps)

    def _fused_product(
        self,
        normalized: Tensor,
        relative: Tensor,
        visibility: Visibility,
        seed: Tensor | None,
        dropout_prob: float,
        weights: AttentionWeights,
    ) -> Tensor:
        """The product with the output matrix, by the fused kernels, which keep no scores."""
        inputs = (normalized, relative.to(normalized.dtype))
        projection, position = linear_and_first(*inputs, weights.projection, weights.bias)  # [B, T, 4D] and [P, 2D]
        visible: tuple[Any, Any, Any] = (visibility.tables, visibility.document_ids, visibility.is_causal)
        rows = (*visible, seed, dropout_prob)
        settings: dict[str, Any] = {"scale": self.scale, "num_heads": self.num_heads}
        if is_gate_fused(normalized.device, normalized.dtype, normalized.shape[-1]):
            return gated_attention(projection, position, *rows, weights.output, **settings, eps=self.eps)
        query, key, value, gate = projection.chunk(4, dim=-1)
        position_query, position_key = position.chunk(2, dim=-1)
        context = fused_attention(query, key, position_query, position_key, value, *rows, **settings)
        return gated_norm(gate, context, weights.output, approximate="none", eps=self.eps)

    def pack(self, dtype: torch.dtype) -> AttentionWeights:
        """The parameters with new copies in the products' dtype."""
        layers = (self.query_key, self.value_gate)
        projection, bias = ([getattr(layer, name) for layer in layers] for name in ("weight", "bias"))
        return AttentionWeights(*(Packed.of(parts, dtype) for parts in (projection, bias, [self.output.weight])))

    def heads(self, x: Tensor) -> Tensor:
        """[..., D] to [H, ..., d], contiguous, so the matmuls need no further copies."""
        return x.unflatten(-1, (self.num_heads, -1)).movedim(-2, 0).contiguous()
