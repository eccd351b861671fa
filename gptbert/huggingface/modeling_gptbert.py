"""GPT-BERT (Charpentier & Samuel 2024, arXiv 2410.24159) for transformers, 4.51 and newer.

One transformer that is both a masked and a causal language model: `AutoModelForMaskedLM` attends to all positions,
`AutoModelForCausalLM` to earlier ones, with the same weights. Parameters have the published names.

Letters of shapes: B rows, T positions, K keys (those of the cache and T), D hidden, H heads, d = D/H, V vocabulary,
S bucket size, P = 2S − 1 distinct position vectors.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from .configuration_gptbert import GPTBertConfig

# transformers renamed it
_CACHE_FIELD = next(
    name for name in ("cache", "past_key_values") if name in CausalLMOutputWithPast.__dataclass_fields__
)


@dataclasses.dataclass
class Encoding:
    """What the encoder gives.

    Attributes:
        last_hidden_state: [B, T, D].
        hidden_states: the embedding and each layer's output, [B, T, D] each, if asked for.
        attentions: each layer's probabilities [B, H, T, K], if asked for.
        cache: keys and values of all positions so far, if asked for.
    """

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None
    cache: Cache | None


class GPTBertPreTrainedModel(PreTrainedModel):
    """What all models share: embedding, encoder, and strict loading."""

    config_class = GPTBertConfig
    base_model_prefix = "gptbert"
    _no_split_modules = ("Attention", "FeedForward")
    _supports_cache_class = True
    _keys_to_ignore_on_load_unexpected = (r"\.position_indices$",)  # a buffer in published checkpoints
    accepts_loss_kwargs = False  # the loss is a mean over this batch's labels

    def __init__(self, config: GPTBertConfig) -> None:
        super().__init__(config)
        self.embedding = Embedding(config)
        self.transformer = Encoder(config)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, but strict: only a new head may lack its weights.

        Raises:
            ValueError: weights are missing, or belong to no part of the model.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        missing = [name for name in info["missing_keys"] if not name.startswith("head.")]
        for problem, names in (("missing", missing), ("unknown", info["unexpected_keys"])):
            if names:
                raise ValueError(f"{cls.__name__}: {len(names)} {problem} weights: {', '.join(sorted(names)[:5])}")
        return (model, info) if output_loading_info else model

    def get_input_embeddings(self) -> nn.Embedding:
        """The word embedding."""
        return self.embedding.word_embedding

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the word embedding."""
        self.embedding.word_embedding = value

    def _init_weights(self, module: nn.Module) -> None:
        std = math.sqrt(2 / (5 * self.config.hidden_size))
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, Embedding):
            nn.init.trunc_normal_(module.relative_embedding, std=std, a=-2 * std, b=2 * std)
        elif isinstance(module, LayerWeighting):
            for alpha in module.alphas:
                nn.init.zeros_(alpha)
                nn.init.ones_(alpha[-1:])

    def encode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        causal: bool,
        cache: Cache | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> Encoding:
        """Contextual representations.

        Args:
            input_ids: [B, T].
            attention_mask: [B, K] or [B, T, K] (or [B, 1, T, K]), 1 where a key may be attended to, 0 where not;
                None attends to all.
            causal: attend only to earlier positions and oneself.
            cache: keys and values of earlier positions, to which this call adds its own.
            output_hidden_states: None asks the configuration.
            output_attentions: None asks the configuration.

        Raises:
            ValueError: a mask of another shape.
        """
        num_past = 0 if cache is None else cache.get_seq_length()
        mask = visible_keys(input_ids, attention_mask, causal, num_past)
        hidden_states, relative = self.embedding(input_ids)
        buckets = position_buckets(input_ids.shape[1], num_past, self.config, input_ids.device)
        states, attentions = self.transformer(hidden_states, relative, buckets, mask, cache)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        return Encoding(
            states[-1],
            tuple(states) if output_hidden_states else None,
            tuple(attentions) if output_attentions else None,
            cache,
        )


class GPTBertModel(GPTBertPreTrainedModel):
    """The encoder alone; bidirectional unless the configuration says `is_decoder`."""

    _keys_to_ignore_on_load_unexpected = (r"\.position_indices$", r"^classifier\.", r"^head\.")

    def __init__(self, config: GPTBertConfig) -> None:
        super().__init__(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPast | tuple[Tensor, ...]:
        """Representations [B, T, D]; see `GPTBertPreTrainedModel.encode`."""
        encoding = self.encode(
            input_ids, attention_mask, self.config.is_decoder, None, output_hidden_states, output_attentions
        )
        output = BaseModelOutputWithPast(
            last_hidden_state=encoding.last_hidden_state,
            hidden_states=encoding.hidden_states,
            attentions=encoding.attentions,
        )
        return _returned(output, return_dict)


class _LanguageModel(GPTBertPreTrainedModel):
    """The encoder under the head that scores tokens."""

    _tied_weights_keys = {"classifier.nonlinearity.5.weight": "embedding.word_embedding.weight"}  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = (r"\.position_indices$", r"^head\.")

    def __init__(self, config: GPTBertConfig) -> None:
        super().__init__(config)
        self.classifier = LanguageModelHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        """The output matrix, which is the word embedding."""
        return self.classifier.nonlinearity[5]

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace the output matrix."""
        self.classifier.nonlinearity[5] = value


class GPTBertForMaskedLM(_LanguageModel):
    """Bidirectional; fills `<mask>`.

    The training predicts a masked token from the position before it. The logits here are shifted so that those of
    token t stand at position t (`GPTBertConfig.shift_masked_logits`); a first token is predicted from nothing.
    """

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> MaskedLMOutput | tuple[Tensor, ...]:
        """Logits [B, T, V], and the mean loss if there are labels.

        Args:
            input_ids: [B, T].
            attention_mask: see `GPTBertPreTrainedModel.encode`.
            labels: [B, T], the token at each position, −100 where there is none to predict.
            output_hidden_states: None asks the configuration.
            output_attentions: None asks the configuration.
            return_dict: None asks the configuration.
        """
        encoding = self.encode(input_ids, attention_mask, False, None, output_hidden_states, output_attentions)
        hidden_states = encoding.last_hidden_state
        if self.config.shift_masked_logits:
            if attention_mask is not None and attention_mask.ndim == 2:  # what stands left of a text is nothing
                hidden_states = hidden_states.masked_fill(attention_mask.unsqueeze(-1) == 0, 0)
            hidden_states = F.pad(hidden_states, (0, 0, 1, 0))[:, :-1]
        logits = self.classifier(hidden_states)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        output = MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=encoding.hidden_states, attentions=encoding.attentions
        )
        return _returned(output, return_dict)


class GPTBertForCausalLM(_LanguageModel, GenerationMixin):
    """Attends to earlier positions; continues a text."""

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> dict[str, Any]:
        """What `generate` gives to `forward`: of all ids, those [B, T] that the cache does not hold yet."""
        cache = cache if cache is not None else past_key_values
        if cache is not None:
            input_ids = input_ids[:, cache.get_seq_length() :]
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "past_key_values": cache,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
        }

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int = 0,
    ) -> CausalLMOutputWithPast | tuple[Tensor, ...]:
        """Logits [B, T, V] of each position's next token, and the mean loss if there are labels.

        Args:
            input_ids: [B, T]; with a cache, only those that it does not hold yet.
            attention_mask: see `GPTBertPreTrainedModel.encode`.
            past_key_values: a cache of earlier positions.
            cache: newer transformers' name of it.
            labels: [B, T], the input ids (shifted in here), −100 where there is none to predict.
            use_cache: return keys and values; None asks the configuration, and never in training.
            output_hidden_states: None asks the configuration.
            output_attentions: None asks the configuration.
            return_dict: None asks the configuration.
            logits_to_keep: of the last so many positions only; 0 gives all.
        """
        cache = cache if cache is not None else past_key_values
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if cache is None and use_cache:
            cache = DynamicCache()
        encoding = self.encode(input_ids, attention_mask, True, cache, output_hidden_states, output_attentions)
        logits = self.classifier(encoding.last_hidden_state[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=encoding.hidden_states,
            attentions=encoding.attentions,
            **{_CACHE_FIELD: cache if use_cache else None},
        )
        return _returned(output, return_dict)


class GPTBertForSequenceClassification(GPTBertPreTrainedModel):
    """Classifies texts by the representation of `<s>`, or of the last token if the configuration says `is_decoder`."""

    _keys_to_ignore_on_load_unexpected = (r"\.position_indices$", r"^classifier\.")

    def __init__(self, config: GPTBertConfig) -> None:
        super().__init__(config)
        self.head = ClassificationHead(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput | tuple[Tensor, ...]:
        """Logits [B, num_labels], and the mean loss if there are labels.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T].
            labels: [B] integers; [B] numbers for a regression; [B, num_labels] numbers for several labels at once
                (`config.problem_type` decides, else their type and `num_labels` do).
            output_hidden_states: None asks the configuration.
            output_attentions: None asks the configuration.
            return_dict: None asks the configuration.
        """
        causal = self.config.is_decoder
        encoding = self.encode(input_ids, attention_mask, causal, None, output_hidden_states, output_attentions)
        logits = self.head(self._pooled(encoding.last_hidden_state, attention_mask))
        output = SequenceClassifierOutput(
            loss=None if labels is None else self._loss(logits, labels),
            logits=logits,
            hidden_states=encoding.hidden_states,
            attentions=encoding.attentions,
        )
        return _returned(output, return_dict)

    def _pooled(self, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
        """[B, T, D] to [B, D]."""
        last = hidden_states.shape[1] - 1
        if attention_mask is None or attention_mask.ndim != 2:
            return hidden_states[:, last if self.config.is_decoder else 0]
        present = attention_mask.long()
        first = present.argmax(dim=-1)
        position = last - present.flip(-1).argmax(dim=-1) if self.config.is_decoder else first
        return hidden_states[torch.arange(len(hidden_states), device=hidden_states.device), position]

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        problem = self.config.problem_type
        if problem is None and self.config.num_labels == 1:
            problem = "regression"
        elif problem is None:
            problem = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
        if problem == "regression":
            return F.mse_loss(logits.float().view_as(labels), labels.float())
        if problem == "multi_label_classification":
            return F.binary_cross_entropy_with_logits(logits.float(), labels.float())
        return F.cross_entropy(logits.float(), labels)


class GPTBertForTokenClassification(GPTBertPreTrainedModel):
    """Classifies every token."""

    _keys_to_ignore_on_load_unexpected = (r"\.position_indices$", r"^classifier\.")

    def __init__(self, config: GPTBertConfig) -> None:
        super().__init__(config)
        self.head = ClassificationHead(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> TokenClassifierOutput | tuple[Tensor, ...]:
        """Logits [B, T, num_labels], and the mean loss if there are labels [B, T], −100 where there is none."""
        causal = self.config.is_decoder
        encoding = self.encode(input_ids, attention_mask, causal, None, output_hidden_states, output_attentions)
        logits = self.head(encoding.last_hidden_state)
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        output = TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=encoding.hidden_states, attentions=encoding.attentions
        )
        return _returned(output, return_dict)


class Embedding(nn.Module):
    """Token embeddings and the P vectors of relative positions."""

    def __init__(self, config: GPTBertConfig) -> None:
        super().__init__()
        self.word_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.word_layer_norm = _layer_norm(config.hidden_size, config)
        self.relative_embedding = nn.Parameter(torch.empty(2 * config.position_bucket_size - 1, config.hidden_size))
        self.relative_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T] ids to [B, T, D] and the position vectors [P, D]."""
        hidden_states = self.dropout(self.word_layer_norm(self.word_embedding(input_ids)))
        return hidden_states, self.relative_layer_norm(self.relative_embedding)


class Encoder(nn.Module):
    """Attention and feed-forward in turns, a mix of all representations so far behind each."""

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
            cache: takes this layer's keys and values, and gives those of all positions.
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
    """Representations to scores of tokens."""

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
    """As the language model's head, with classes instead of tokens."""

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


def visible_keys(input_ids: Tensor, attention_mask: Tensor | None, causal: bool, num_past: int) -> Tensor:
    """[B or 1, 1, T or 1, K] bool: True where a query may see a key; arguments as in `GPTBertPreTrainedModel.encode`.

    Raises:
        ValueError: a mask of another shape.
    """
    num_rows, length = input_ids.shape
    num_keys = num_past + length
    mask = torch.ones(1, 1, 1, num_keys, dtype=torch.bool, device=input_ids.device)
    if attention_mask is not None:
        shape = tuple(attention_mask.shape)
        if shape not in {
            (num_rows, num_keys), (num_rows, length, num_keys), (num_rows, 1, length, num_keys)
        }:  # fmt: skip
            raise ValueError(
                f"attention_mask has shape {shape}, expected ({num_rows}, {num_keys}) or "
                f"({num_rows}, {length}, {num_keys})"
            )
        mask = attention_mask != 0
        if mask.ndim == 2:
            mask = mask[:, None, None, :]
        elif mask.ndim == 3:
            mask = mask.unsqueeze(1)
    if causal:
        query = torch.arange(num_past, num_keys, device=input_ids.device)
        mask = mask & (torch.arange(num_keys, device=input_ids.device) <= query[:, None])
    return mask


def position_buckets(length: int, num_past: int, config: GPTBertConfig, device: torch.device) -> Tensor:
    """[T, K] int64, the index of the position vector of each query and key: exact up to S/2, then logarithmic."""
    middle, farthest = config.position_bucket_size // 2, config.max_position_embeddings - 1
    num_keys = num_past + length
    distance = torch.arange(num_keys)  # on the CPU and in one precision, so that every device rounds alike
    far = torch.log(distance.clamp(middle, farthest) / middle) / math.log(farthest / middle) * (middle - 1)
    bucket = torch.where(distance <= middle, distance, middle + far.ceil().long()).to(device)
    signed = torch.arange(num_past, num_keys, device=device)[:, None] - torch.arange(num_keys, device=device)
    return config.position_bucket_size - 1 + signed.sign() * bucket[signed.abs()]


def _layer_norm(size: int, config: GPTBertConfig) -> nn.LayerNorm:
    return nn.LayerNorm(size, eps=config.layer_norm_eps, elementwise_affine=False)


def _returned(output: Any, return_dict: bool | None) -> Any:
    return output.to_tuple() if return_dict is False else output


# so that `save_pretrained` takes this code along
GPTBertConfig.register_for_auto_class()
GPTBertModel.register_for_auto_class("AutoModel")
GPTBertForMaskedLM.register_for_auto_class("AutoModelForMaskedLM")
GPTBertForCausalLM.register_for_auto_class("AutoModelForCausalLM")
GPTBertForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
GPTBertForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
