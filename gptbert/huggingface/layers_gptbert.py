# SPDX-License-Identifier: Apache-2.0
"""Layers of GPT-BERT (Charpentier & Samuel 2024, arXiv 2410.24159), for the models of modeling_gptbert.py.

Letters of shapes: B rows, T positions, K keys (cached ones and T), D hidden, I intermediate, H heads, d = D/H,
V vocabulary, S bucket size, P = 2S − 1 distinct position vectors.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, StaticCache

from .configuration_gptbert import GPTBertConfig

LARGEST_HIDING = -1000.0  # values of additive masks that hide a key: −10,000 in old code, the dtype's least, −inf


class Pairs(NamedTuple):
    """What attention knows of the pairs of queries and keys; the same for all layers.

    Attributes:
        buckets: [T, K] int64, the index of each pair's position vector.
        mask: [B or 1, 1, T or 1, K] bool, True where a query may see a key.
        place: [T] int64, the queries' places among the keys.
    """

    buckets: Tensor
    mask: Tensor
    place: Tensor


class Embedding(nn.Module):
    """Token embeddings and the P vectors of relative positions."""

    def __init__(self, config: GPTBertConfig) -> None:
        super().__init__()
        self.word_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.word_layer_norm = layer_norm(config.hidden_size, config)
        self.relative_embedding = nn.Parameter(torch.empty(2 * config.position_bucket_size - 1, config.hidden_size))
        self.relative_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, inputs_embeds: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the word embedding [B, T, D] to [B, T, D] and the position vectors [P, D]."""
        hidden_states = self.dropout(self.word_layer_norm(inputs_embeds))
        return hidden_states, self.relative_layer_norm(self.relative_embedding)


class Encoder(nn.Module):
    """Alternating attention and feed-forward layers, each followed by a mix of all representations so far."""

    def __init__(self, config: GPTBertConfig) -> None:
        super().__init__()
        layers = range(config.num_hidden_layers)
        self.attention_layers = nn.ModuleList(Attention(config, layer) for layer in layers)
        self.mlp_layers = nn.ModuleList(FeedForward(config) for _ in layers)
        self.dwa_modules = LayerWeighting(config)
        self.gradient_checkpointing = False  # transformers sets it, and `_gradient_checkpointing_func`

    def forward(
        self, hidden_states: Tensor, relative: Tensor, pairs: Pairs, cache: Cache | None, with_attentions: bool
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """The embedding's and each layer's output [B, T, D], and each layer's probabilities [B, H, T, K] or None."""
        representations, states, attentions = [hidden_states], [hidden_states], []
        for attention, feed_forward in zip(self.attention_layers, self.mlp_layers, strict=True):
            output, probabilities = self._run(attention, hidden_states, relative, *pairs, cache, with_attentions)
            representations.append(hidden_states + output)
            hidden_states = self.dwa_modules(representations)
            representations.append(hidden_states + self._run(feed_forward, hidden_states))
            hidden_states = self.dwa_modules(representations)
            states.append(hidden_states)
            attentions.append(probabilities)
        return states, attentions

    def _run(self, layer: nn.Module, *inputs: Any) -> Any:
        """The layer's output, computed again in the backward if so configured; a cache would be filled twice then."""
        has_cache = any(isinstance(each, Cache) for each in inputs)
        if self.gradient_checkpointing and self.training and not has_cache:
            return self._gradient_checkpointing_func(layer.__call__, *inputs)  # type: ignore[operator]  # transformers sets it
        return layer(*inputs)


class LayerWeighting(nn.Module):
    """Depth-weighted averages: x_n = Σ_{m≤n} α_{n,m}·y_m."""

    def __init__(self, config: GPTBertConfig) -> None:
        super().__init__()
        depths = range(1, 2 * config.num_hidden_layers + 1)
        self.alphas = LayerWeights(nn.Parameter(torch.empty(depth + 1)) for depth in depths)

    def forward(self, representations: Sequence[Tensor]) -> Tensor:
        """y_0 … y_n, [B, T, D] each, to x_n."""
        first, *others = self.alphas(len(representations) - 2).unbind()
        mixed = first * representations[0]
        for weight, representation in zip(others, representations[1:], strict=True):
            mixed = torch.addcmul(mixed, weight, representation)
        return mixed


class LayerWeights(nn.ParameterList):
    """The α; called for those of one depth, so that accelerate's hooks bring them where weights are offloaded."""

    __call__ = nn.Module.__call__  # a `ParameterList` refuses

    def forward(self, depth: int) -> Tensor:
        """[depth + 2]."""
        return self[depth]


class Attention(nn.Module):
    """Attention with disentangled relative positions and a gated output, without the residual connection."""

    def __init__(self, config: GPTBertConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.num_heads = config.num_attention_heads
        self.scale = 1 / math.sqrt(3 * (config.hidden_size // config.num_attention_heads))
        self.in_proj_qk = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.in_proj_vg = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.pre_layer_norm = layer_norm(config.hidden_size, config)
        self.post_layer_norm = layer_norm(config.hidden_size, config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.attention_dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def forward(
        self,
        hidden_states: Tensor,
        relative: Tensor,
        buckets: Tensor,
        mask: Tensor,
        place: Tensor,
        cache: Cache | None,
        with_attentions: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The output [B, T, D], and the probabilities [B, H, T, K] if asked for.

        Args:
            hidden_states: [B, T, D].
            relative: [P, D].
            buckets: see `Pairs`.
            mask: see there.
            place: see there.
            cache: stores this layer's keys and values, and returns those of all positions.
            with_attentions: return the probabilities, which only the eager implementation has.
        """
        hidden_states = self.pre_layer_norm(hidden_states)
        query, key = self._heads(self.in_proj_qk(hidden_states))
        value, gate = self.in_proj_vg(hidden_states).chunk(2, dim=-1)
        value = value.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)
        position_query, position_key = self._heads(self.in_proj_qk(self.dropout(relative)))  # [H, P, d]
        if cache is not None:
            key, value = cache.update(key, value, self.layer, {"cache_position": place})
        query, position_query = query * self.scale, position_query * self.scale
        by_query = query @ position_key.mT  # [B, H, T, P]
        by_key = position_query @ key.mT  # [B, H, P, K]
        pairs = (*query.shape[:-1], key.shape[-2])
        bias = by_query.gather(-1, buckets.expand(pairs)) + by_key.gather(-2, buckets.expand(pairs))  # [B, H, T, K]
        bias = bias.masked_fill(~mask, torch.finfo(bias.dtype).min)
        if self.config._attn_implementation == "sdpa" and not with_attentions:  # noqa: SLF001  transformers' name
            dropout_prob = self.attention_dropout.p if self.training else 0.0
            context = F.scaled_dot_product_attention(query, key, value, bias.to(query.dtype), dropout_prob, scale=1.0)
            context = context.masked_fill(~mask.any(-1, keepdim=True), 0.0)  # a query that sees no key
            probabilities = None
        else:
            precision = torch.promote_types(bias.dtype, torch.float32)
            scores = (query @ key.mT).to(precision) + bias.to(precision)
            probabilities = scores.softmax(dim=-1).masked_fill(~mask, 0.0).to(value.dtype)
            context = self.attention_dropout(probabilities) @ value
        context = context.transpose(1, 2).flatten(2)  # [B, T, D]
        context = self.post_layer_norm(context * F.gelu(gate))
        return self.dropout(self.out_proj(context)), probabilities if with_attentions else None

    def _heads(self, query_key: Tensor) -> tuple[Tensor, Tensor]:
        """[..., T, 2D] to two of [..., H, T, d]."""
        query, key = (x.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2) for x in query_key.chunk(2, dim=-1))
        return query, key


class FeedForward(nn.Module):
    """Gated feed-forward, without the residual connection."""

    def __init__(self, config: GPTBertConfig) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            layer_norm(config.hidden_size, config),
            nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False),
            GatedGELU(),
            layer_norm(config.intermediate_size, config),
            nn.Linear(config.intermediate_size, config.hidden_size, bias=False),
            nn.Dropout(config.hidden_dropout_prob),
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B, T, D] to [B, T, D]."""
        return self.mlp(hidden_states)


class GatedGELU(nn.Module):
    """The first half times the GELU of the second."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., 2I] to [..., I]."""
        linear, gate = x.chunk(2, dim=-1)
        return linear * F.gelu(gate, approximate="tanh")


def attended(attention_mask: Tensor | None) -> Tensor | None:
    """A mask of any kind as bool of the same shape, True where a key may be attended to; None stays None.

    Args:
        attention_mask: bool, True to attend; or numbers, 1 to attend and 0 not to; or an additive mask, floats that
            are 0 to attend and −1000 or less not to, as transformers' four-dimensional masks are.

    Raises:
        ValueError: the mask is none of these, or could be two of them.
    """
    if attention_mask is None or attention_mask.dtype == torch.bool:
        return attention_mask
    if torch.compiler.is_compiling():  # values are unknown then
        if attention_mask.is_floating_point():
            raise ValueError("a compiled model takes an attention_mask of bool or integers, not of floats")
        return attention_mask != 0
    zero, one = attention_mask == 0, attention_mask == 1
    if (zero | one).all():
        if not attention_mask.is_floating_point() or one.any():
            return one
        if attention_mask.ndim != 4:
            raise ValueError(
                "attention_mask is 0 everywhere, of floats: all positions by an additive mask, none by one of 0 and 1; "
                "pass bool or integers"
            )
        return zero
    if attention_mask.is_floating_point() and (zero | (attention_mask <= LARGEST_HIDING)).all():
        return zero
    raise ValueError(
        f"attention_mask holds neither 0 and 1 (attend) nor 0 (attend) and numbers up to {LARGEST_HIDING:g}: values "
        f"from {attention_mask.min().item():g} to {attention_mask.max().item():g}"
    )


def seen_later(attention_mask: Tensor) -> Tensor:
    """[B or 1, T] bool: whether a later position sees this one; if none does, it is padding, or of another document.

    Args:
        attention_mask: bool, of any shape that `GPTBertPreTrainedModel.encode` takes without a cache.
    """
    if attention_mask.ndim == 2:
        return attention_mask
    by_query = attention_mask if attention_mask.ndim == 3 else attention_mask[:, 0]  # [B or 1, T or 1, T]
    return by_query[:, 0] if by_query.shape[1] == 1 else by_query.tril(-1).any(dim=1)


def all_pairs(
    inputs_embeds: Tensor, attention_mask: Tensor | None, causal: bool, cache: Cache | None, table: Sequence[int]
) -> Pairs:
    """What attention knows of all pairs; arguments as in `GPTBertPreTrainedModel.encode`, and `bucket_table`.

    Raises:
        ValueError: the mask has a different shape or unclear values.
    """
    length, device = inputs_embeds.shape[1], inputs_embeds.device
    num_past = 0 if cache is None else cache.get_seq_length()
    num_keys = _capacity(cache) if isinstance(cache, StaticCache) else num_past + length
    place, keys = torch.arange(length, device=device) + num_past, torch.arange(num_keys, device=device)
    distance = place[:, None] - keys  # [T, K]
    farthest = len(table) // 2
    buckets = torch.tensor(table, device=device)[distance.clamp(-farthest, farthest) + farthest]
    mask = visible_keys(inputs_embeds, of_all_keys(attention_mask, cache), num_keys)
    return Pairs(buckets, mask & (distance >= 0) if causal else mask, place)


def of_all_keys(attention_mask: Tensor | None, cache: Cache | None) -> Tensor | None:
    """A mask [B, positions so far], longer by a static cache's empty places; any other mask as it is."""
    if attention_mask is None or attention_mask.ndim != 2 or not isinstance(cache, StaticCache):
        return attention_mask
    return F.pad(attention_mask, (0, max(_capacity(cache) - attention_mask.shape[1], 0)))


def visible_keys(inputs_embeds: Tensor, attention_mask: Tensor | None, num_keys: int) -> Tensor:
    """[B or 1, 1, T or 1, K] bool: True where a mask lets a query see a key.

    Raises:
        ValueError: the mask has a different shape or unclear values.
    """
    num_rows, length = inputs_embeds.shape[:2]
    if attention_mask is None:
        return torch.ones(1, 1, 1, num_keys, dtype=torch.bool, device=inputs_embeds.device)
    shape = tuple(attention_mask.shape)
    fitting = [(num_rows, num_keys), (num_rows, length, num_keys)]
    fitting += [(rows, 1, queries, num_keys) for rows in (num_rows, 1) for queries in (length, 1)]
    if not any(shape == each for each in fitting):  # not `in`: sizes are symbols under torch.export
        raise ValueError(
            f"attention_mask has shape {shape}, expected ({num_rows}, {num_keys}) or "
            f"({num_rows}, {length}, {num_keys}), or ({num_rows}, 1, {length}, {num_keys})"
        )
    mask: Any = attended(attention_mask)
    if mask.ndim == 2:
        return mask[:, None, None, :]
    return mask.unsqueeze(1) if mask.ndim == 3 else mask


def bucket_table(config: GPTBertConfig) -> list[int]:
    """The index of the position vector of each distance −(M − 1) … M − 1, where M is `max_position_embeddings`.

    Exact up to S/2, then logarithmic. Computed once, on the CPU and in fp32, since others round logarithms differently.
    """
    middle, farthest = config.position_bucket_size // 2, config.max_position_embeddings - 1
    distance = torch.arange(-farthest, farthest + 1, device="cpu")
    far = torch.log(distance.abs().clamp(middle) / middle) / math.log(farthest / middle) * (middle - 1)
    far = distance.sign() * (middle + far.ceil().clamp(max=middle - 1).long())  # which may be rounded up to middle
    return (config.position_bucket_size - 1 + torch.where(distance.abs() <= middle, distance, far)).tolist()


def _capacity(cache: StaticCache) -> int:
    """How many positions a static cache has room for: renamed in newer transformers."""
    return cache.max_cache_len if hasattr(cache, "max_cache_len") else cache.layers[0].max_cache_len


def layer_norm(size: int, config: GPTBertConfig) -> nn.LayerNorm:
    """LayerNorm without scale and bias, as everywhere but in `Embedding`'s relative positions."""
    return nn.LayerNorm(size, eps=config.layer_norm_eps, elementwise_affine=False)
