# SPDX-License-Identifier: Apache-2.0
"""What all models of modeling_gptbert.py share: embedding, encoder, initialization and strict loading.

Letters of shapes: B rows, T positions, K keys (cached ones and T), D hidden, H heads.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from .configuration_gptbert import GPTBertConfig
from .layers_gptbert import Embedding, Encoder, all_pairs, bucket_table


class GPTBertPreTrainedModel(PreTrainedModel):
    """Base of all models: embedding, encoder, and strict loading."""

    config_class = GPTBertConfig
    base_model_prefix = "gptbert"
    _no_split_modules = ["Attention", "FeedForward"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_cache_class = True
    _supports_static_cache = True
    _keys_to_ignore_on_load_unexpected: list[str] = [r"\.position_indices$"]  # a buffer in published checkpoints
    accepts_loss_kwargs = False  # the loss is a mean over this batch's labels

    def __init__(self, config: GPTBertConfig) -> None:
        super().__init__(config)
        self.embedding = Embedding(config)
        self.transformer = Encoder(config)
        self._bucket_table = bucket_table(config)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As in transformers, but strict: only a new head may lack its weights.

        Raises:
            ValueError: weights are missing or unexpected.
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
            if (bias := getattr(module, "bias", None)) is not None:
                nn.init.zeros_(bias)
        elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, Embedding):
            nn.init.trunc_normal_(module.relative_embedding, std=std, a=-2 * std, b=2 * std)
        elif isinstance(module, nn.ParameterList):  # of `LayerWeighting`, which newer transformers skip: it has no own
            for alpha in module:
                if not getattr(alpha, "_is_hf_initialized", False):  # loaded; a part of it would not have the mark
                    nn.init.zeros_(alpha)
                    nn.init.ones_(alpha[-1:])

    def returned(self, output: Any, return_dict: bool | None) -> Any:
        """The output, or a tuple of it if the caller or else the configuration says so."""
        if return_dict is None:
            return_dict = self.config.return_dict
        return output if return_dict else output.to_tuple()

    def encode(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        causal: bool,
        cache: Cache | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, tuple[Tensor, ...] | None]]:
        """Contextual representations [B, T, D], and the optional fields of transformers' outputs.

        These are `hidden_states`, the embedding and each layer's output [B, T, D], and `attentions`, each layer's
        probabilities [B, H, T, K]; None unless requested. Warns once if there is padding and no mask, since padding is
        then read as text.

        Args:
            input_ids: [B, T], or None.
            attention_mask: [B, K], [B, T, K] or [B or 1, 1, T or 1, K]; see `layers_gptbert.attended` for its values,
                such as 1 where a key may be attended to, 0 where not; None attends to all.
            causal: attend only to positions up to one's own.
            cache: keys and values of earlier positions, to which this call adds its own.
            output_hidden_states: None uses the configuration's.
            output_attentions: None uses the configuration's.
            inputs_embeds: rows of the word embedding [B, T, D] in place of ids, or None.
            token_type_ids: zeros, as some tokenizers add: there is one type.

        Raises:
            ValueError: neither ids nor embeddings are given, or both; or a token is of another type than 0; or the mask
                has a different shape or unclear values.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        if token_type_ids is not None and not torch.compiler.is_compiling() and token_type_ids.any():
            raise ValueError("token_type_ids are not all 0, and a GPT-BERT has no types of tokens")
        if inputs_embeds is None:
            self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
            inputs_embeds = self.embedding.word_embedding(input_ids)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        pairs = all_pairs(inputs_embeds, attention_mask, causal, cache, self._bucket_table)
        hidden_states, relative = self.embedding(inputs_embeds)
        states, attentions = self.transformer(hidden_states, relative, pairs, cache, output_attentions)
        extras = {
            "hidden_states": tuple(states) if output_hidden_states else None,
            "attentions": tuple(attentions) if output_attentions else None,
        }
        return states[-1], extras
