"""Layers of GPT-BERT (Charpentier & Samuel 2024, arXiv 2410.24159), for the models of modeling_gptbert.py.

Letters of shapes: B rows, T positions, K keys (cached ones and T), D hidden, I intermediate, H heads, d = D/H,
V vocabulary, S bucket size, P = 2S − 1 distinct position vectors.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .configuration_gptbert import GPTBertConfig

LARGEST_HIDING = -1000.0  # values of additive masks that hide a key: −10,000 in old code, the dtype's least, −inf


class Embedding(nn.Module):
    """Token embeddings and the P vectors of relative positions."""

    def __init__(self, config: GPTBertConfig) -> None:
        super().__init__()
        self.word_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.word_layer_norm = _layer_norm(config.hidden_size, config)
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

    def forward(
        self, hidden_states: Tensor, relative: Tensor, buckets: Tensor, mask: Tensor, cache: Cache | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The embedding's and each layer's output [B, T, D], and each layer's probabilities [B, H, T, K]."""
        representations, states, attentions = [hidden_states], [hidden_states], []
        for attention, feed_forward in zip(self.attention_layers, self.mlp_layers, strict=True):
            output, probabilities = attention(hidden_states, relative, buckets, mask, cache)
            representations.append(hidden_states + output)
            hidden_states = self.dwa_modules(representations)
            representations.append(hidden_states + feed_forward(hidden_states))
            hidden_states = self.dwa_modules(representations)
            states.append(hidden_states)
            attentions.append(probabilities)
        return states, attentions


class LayerWeighting(nn.Module):
    """Depth-weighted averages: x_n = Σ_{m≤n} α_{n,m}·y_m."""

    def __init__(self, config: GPTBertConfig) -> None:
        super().__init__()
        depths = range(1, 2 * config.num_hidden_layers + 1)
        self.alphas = nn.ParameterList(nn.Parameter(torch.empty(depth + 1)) for depth in depths)

    def forward(self, representations: Sequence[Tensor]) -> Tensor:
        """y_0 … y_n, [B, T, D] each, to x_n."""
        alpha = self.alphas[len(representations) - 2]
        mixed = alpha[0] * representations[0]
        for weight, representation in zip(alpha[1:], representations[1:], strict=True):
            mixed = mixed + weight * representation
        return mixed


class Attention(nn.Module):
    """Attention with disentangled relative positions and a gated output, without the residual connection."""

    def __init__(self, config: GPTBertConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads = config.num_attention_heads
        self.scale = 1 / math.sqrt(3 * (config.hidden_size // config.num_attention_heads))
        self.in_proj_qk = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.in_proj_vg = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.pre_layer_norm = _layer_norm(config.hidden_size, config)
        self.post_layer_norm = _layer_norm(config.hidden_size, config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.attention_dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def forward(
        self, hidden_states: Tensor, relative: Tensor, buckets: Tensor, mask: Tensor, cache: Cache | None
    ) -> tuple[Tensor, Tensor]:
        """The output [B, T, D] and the probabilities [B, H, T, K].

        Args:
            hidden_states: [B, T, D].
            relative: [P, D].
            buckets: [T, K], the index of each query's and key's position vector.
            mask: [B, 1, T, K] bool, True where a query may see a key.
            cache: stores this layer's keys and values, and returns those of all positions.
        """
        hidden_states = self.pre_layer_norm(hidden_states)
        query, key = self._heads(self.in_proj_qk(hidden_states))
        value, gate = self.in_proj_vg(hidden_states).chunk(2, dim=-1)
        value = value.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)
        position_query, position_key = self._heads(self.in_proj_qk(self.dropout(relative)))  # [H, P, d]
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
        scores = query @ key.transpose(-2, -1)  # [B, H, T, K]
        by_query = query @ position_key.transpose(-2, -1)  # [B, H, T, P]
        by_key = key @ position_query.transpose(-2, -1)  # [B, H, K, P]
        scores = scores + by_query.gather(-1, buckets.expand_as(scores))
        scores = scores + by_key.gather(-1, buckets.T.expand_as(scores.mT)).mT
        scores = (scores * self.scale).float().masked_fill(~mask, torch.finfo(torch.float32).min)
        probabilities = scores.softmax(dim=-1).masked_fill(~mask, 0.0).to(value.dtype)
        context = (self.attention_dropout(probabilities) @ value).transpose(1, 2).flatten(2)  # [B, T, D]
        context = self.post_layer_norm(context * F.gelu(gate))
        return self.dropout(self.out_proj(context)), probabilities

    def _heads(self, query_key: Tensor) -> tuple[Tensor, Tensor]:
        """[..., T, 2D] to two of [..., H, T, d]."""
        query, key = (x.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2) for x in query_key.chunk(2, dim=-1))
        return query, key


class FeedForward(nn.Module):
    """Gated feed-forward, without the residual connection."""

    def __init__(self, config: GPTBertConfig) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            _layer_norm(config.hidden_size, config),
            nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False),
            GatedGELU(),
            _layer_norm(config.intermediate_size, config),
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


class LanguageModelHead(nn.Module):
    """Representations to token scores."""

    def __init__(self, config: GPTBertConfig) -> None:
        super().__init__()
        self.nonlinearity = nn.Sequential(
            _layer_norm(config.hidden_size, config),
            nn.Linear(config.hidden_size, config.hidden_size),
            nn.GELU(),
            _layer_norm(config.hidden_size, config),
            nn.Dropout(config.hidden_dropout_prob),
            nn.Linear(config.hidden_size, config.vocab_size),
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., D] to [..., V]."""
        return self.nonlinearity(hidden_states)


class ClassificationHead(nn.Module):
    """Like the language model's head, with classes instead of tokens."""

    def __init__(self, config: GPTBertConfig) -> None:
        super().__init__()
        dropout = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.nonlinearity = nn.Sequential(
            _layer_norm(config.hidden_size, config),
            nn.Linear(config.hidden_size, config.hidden_size),
            nn.GELU(),
            _layer_norm(config.hidden_size, config),
            nn.Dropout(dropout),
            nn.Linear(config.hidden_size, config.num_labels),
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., D] to [..., num_labels]."""
        return self.nonlinearity(hidden_states)


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


def visible_keys(inputs_embeds: Tensor, attention_mask: Tensor | None, causal: bool, num_past: int) -> Tensor:
    """[B or 1, 1, T or 1, K] bool: True where a query may see a key; arguments as in `GPTBertPreTrainedModel.encode`.

    Raises:
        ValueError: the mask has a different shape or unclear values.
    """
    num_rows, length = inputs_embeds.shape[:2]
    num_keys = num_past + length
    mask = torch.ones(1, 1, 1, num_keys, dtype=torch.bool, device=inputs_embeds.device)
    if attention_mask is not None:
        shape = tuple(attention_mask.shape)
        rows, queries = {1, num_rows}, {1, length}
        fits = shape in {(num_rows, num_keys), (num_rows, length, num_keys)} or (
            len(shape) == 4 and shape[0] in rows and shape[1] == 1 and shape[2] in queries and shape[3] == num_keys
        )
        if not fits:
            raise ValueError(
                f"attention_mask has shape {shape}, expected ({num_rows}, {num_keys}) or "
                f"({num_rows}, {length}, {num_keys}), or ({num_rows}, 1, {length}, {num_keys})"
            )
        mask = attended(attention_mask)  # type: ignore[assignment]  # of None alone it is None
        if mask.ndim == 2:
            mask = mask[:, None, None, :]
        elif mask.ndim == 3:
            mask = mask.unsqueeze(1)
    if causal:
        query = torch.arange(num_past, num_keys, device=inputs_embeds.device)
        mask = mask & (torch.arange(num_keys, device=inputs_embeds.device) <= query[:, None])
    return mask


def position_buckets(length: int, num_past: int, config: GPTBertConfig, device: torch.device) -> Tensor:
    """[T, K] int64, the index of the position vector of each query and key: exact up to S/2, then logarithmic."""
    middle, farthest = config.position_bucket_size // 2, config.max_position_embeddings - 1
    num_keys = num_past + length
    distance = torch.arange(num_keys)  # on the CPU and in one precision, so that all devices round alike
    far = torch.log(distance.clamp(middle, farthest) / middle) / math.log(farthest / middle) * (middle - 1)
    bucket = torch.where(distance <= middle, distance, middle + far.ceil().long()).to(device)
    signed = torch.arange(num_past, num_keys, device=device)[:, None] - torch.arange(num_keys, device=device)
    return config.position_bucket_size - 1 + signed.sign() * bucket[signed.abs()]


def _layer_norm(size: int, config: GPTBertConfig) -> nn.LayerNorm:
    return nn.LayerNorm(size, eps=config.layer_norm_eps, elementwise_affine=False)
