# SPDX-License-Identifier: Apache-2.0
"""GPT-BERT (Charpentier & Samuel 2024, arXiv 2410.24159) for transformers, 4.51 and newer.

One transformer that is both a masked and a causal language model: `AutoModelForMaskedLM` attends to all positions,
`AutoModelForCausalLM` to earlier ones, with the same weights. Parameters have the published names.

Letters of shapes: B rows, T positions, D hidden, V vocabulary.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from .configuration_gptbert import GPTBertConfig
from .heads_gptbert import Head, mean_loss, span_loss, text_loss, text_state
from .layers_gptbert import attended, of_all_keys, seen_later
from .pretrained_gptbert import GPTBertPreTrainedModel

# renamed in newer transformers
_CACHE_FIELD = next(
    name for name in ("cache", "past_key_values") if name in CausalLMOutputWithPast.__dataclass_fields__
)


class GPTBertModel(GPTBertPreTrainedModel):
    """The encoder alone; bidirectional unless the configuration sets `is_decoder`."""

    _keys_to_ignore_on_load_unexpected = [r"\.position_indices$", r"^classifier\.", r"^head\."]

    def __init__(self, config: GPTBertConfig) -> None:
        super().__init__(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> BaseModelOutputWithPast | tuple[Tensor, ...]:
        """Representations [B, T, D]; see `GPTBertPreTrainedModel.encode`."""
        causal = self.config.is_decoder
        options = (output_hidden_states, output_attentions, inputs_embeds, token_type_ids)
        hidden_states, extras = self.encode(input_ids, attention_mask, causal, None, *options)
        return self.returned(BaseModelOutputWithPast(last_hidden_state=hidden_states, **extras), return_dict)


class _LanguageModel(GPTBertPreTrainedModel):
    """The encoder with the language model head."""

    _tied_weights_keys = {"classifier.nonlinearity.5.weight": "embedding.word_embedding.weight"}
    _keys_to_ignore_on_load_unexpected = [r"\.position_indices$", r"^head\."]

    def __init__(self, config: GPTBertConfig) -> None:
        super().__init__(config)
        self.classifier = Head(config, config.vocab_size, config.hidden_dropout_prob)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The output matrix, which is the word embedding."""
        return self.classifier.nonlinearity[5]

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replace the output matrix."""
        self.classifier.nonlinearity[5] = value


class GPTBertForMaskedLM(_LanguageModel):
    """Bidirectional; fills `<mask>`.

    In training, a masked token is predicted from the position before it. The logits here are shifted so that those of
    token t are at position t (`GPTBertConfig.shift_masked_logits`); a first token has no context to predict it from.
    """

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> MaskedLMOutput | tuple[Tensor, ...]:
        """Logits [B, T, V], and the mean loss if there are labels.

        Args:
            input_ids: [B, T].
            attention_mask: see `GPTBertPreTrainedModel.encode`.
            labels: [B, T], the token at each position wherever its logits are, −100 to ignore it.
            output_hidden_states: None uses the configuration's.
            output_attentions: None uses the configuration's.
            return_dict: False returns a tuple.
            inputs_embeds: see `GPTBertPreTrainedModel.encode`.
            token_type_ids: see there.
        """
        attention_mask = attended(attention_mask)
        options = (output_hidden_states, output_attentions, inputs_embeds, token_type_ids)
        hidden_states, extras = self.encode(input_ids, attention_mask, False, None, *options)
        if self.config.shift_masked_logits:
            if attention_mask is not None:  # left padding is not context
                hidden_states = hidden_states.masked_fill(~seen_later(attention_mask).unsqueeze(-1), 0)
            hidden_states = F.pad(hidden_states, (0, 0, 1, 0))[:, :-1]
        logits = self.classifier(hidden_states)
        loss = None
        if labels is not None and self.config.shift_masked_logits:
            loss = mean_loss(logits, labels)
        elif labels is not None:  # a token's logits are at the position before it
            loss = mean_loss(logits[:, :-1], labels[:, 1:])
        return self.returned(MaskedLMOutput(loss=loss, logits=logits, **extras), return_dict)


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
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """The arguments that `generate` passes to `forward`: only the ids [B, T] not in the cache yet.

        Embeddings [B, T, D] begin a text; the cache is then longer than the ids, of which the last is new.
        """
        cache = cache if cache is not None else past_key_values
        num_past = 0 if cache is None else int(cache.get_seq_length())
        if inputs_embeds is not None and num_past < inputs_embeds.shape[1]:
            inputs = {"inputs_embeds": inputs_embeds[:, num_past:]}
        else:
            num_new = max(input_ids.shape[1] - num_past, 1)
            inputs = {"input_ids": input_ids[:, -num_new:]}
        return {
            **inputs,
            "attention_mask": of_all_keys(attention_mask, cache),  # of one size, so a compiled step stays the same
            "past_key_values": cache,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
            "token_type_ids": token_type_ids,
            "output_hidden_states": output_hidden_states,
            "output_attentions": output_attentions,
        }

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> CausalLMOutputWithPast | tuple[Tensor, ...]:
        """Logits [B, T, V] of each position's next token, and the mean loss if there are labels.

        Args:
            input_ids: [B, T]; with a cache, only those not in it yet.
            attention_mask: see `GPTBertPreTrainedModel.encode`.
            past_key_values: a cache of earlier positions.
            cache: newer transformers' name for it.
            labels: [B, T], the input ids (shifted internally), −100 to ignore.
            use_cache: return keys and values; None uses the configuration's, or False in training.
            output_hidden_states: None uses the configuration's.
            output_attentions: None uses the configuration's.
            return_dict: False returns a tuple.
            logits_to_keep: compute logits only for this many last positions; 0: for all; a tensor: for these positions.
            inputs_embeds: see `GPTBertPreTrainedModel.encode`.
            token_type_ids: see there.
        """
        cache = cache if cache is not None else past_key_values
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if cache is None and use_cache:
            cache = DynamicCache()
        options = (output_hidden_states, output_attentions, inputs_embeds, token_type_ids)
        hidden_states, extras = self.encode(input_ids, attention_mask, True, cache, *options)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.classifier(hidden_states[:, kept])
        loss = None if labels is None else mean_loss(logits[:, :-1], labels[:, 1:])
        extras[_CACHE_FIELD] = cache if use_cache else None
        return self.returned(CausalLMOutputWithPast(loss=loss, logits=logits, **extras), return_dict)


class _Classifier(GPTBertPreTrainedModel):
    """The encoder with a new head."""

    _keys_to_ignore_on_load_unexpected = [r"\.position_indices$", r"^classifier\."]
    num_classes: int | None = None  # None: the configuration's `num_labels`

    def __init__(self, config: GPTBertConfig) -> None:
        super().__init__(config)
        dropout = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.head = Head(config, self.num_classes or config.num_labels, dropout)
        self.post_init()


class GPTBertForSequenceClassification(_Classifier):
    """Classifies texts by the representation of `<s>`, or of the last token if the configuration sets `is_decoder`."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> SequenceClassifierOutput | tuple[Tensor, ...]:
        """Logits [B, num_labels], and the mean loss if there are labels.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T].
            labels: [B] integers; [B] numbers for regression; [B, num_labels] numbers for multi-label classification
                (by `config.problem_type`, else inferred from their dtype and `num_labels`).
            output_hidden_states: None uses the configuration's.
            output_attentions: None uses the configuration's.
            return_dict: False returns a tuple.
            inputs_embeds: see `GPTBertPreTrainedModel.encode`.
            token_type_ids: see there.
        """
        causal = self.config.is_decoder
        attention_mask = attended(attention_mask)
        options = (output_hidden_states, output_attentions, inputs_embeds, token_type_ids)
        hidden_states, extras = self.encode(input_ids, attention_mask, causal, None, *options)
        logits = self.head(text_state(hidden_states, attention_mask, causal))
        loss = None if labels is None else text_loss(logits, labels, self.config)
        return self.returned(SequenceClassifierOutput(loss=loss, logits=logits, **extras), return_dict)


class GPTBertForTokenClassification(_Classifier):
    """Classifies every token."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> TokenClassifierOutput | tuple[Tensor, ...]:
        """Logits [B, T, num_labels], and the mean loss if there are labels [B, T], −100 to ignore."""
        causal = self.config.is_decoder
        options = (output_hidden_states, output_attentions, inputs_embeds, token_type_ids)
        hidden_states, extras = self.encode(input_ids, attention_mask, causal, None, *options)
        logits = self.head(hidden_states)
        loss = None if labels is None else mean_loss(logits, labels)
        return self.returned(TokenClassifierOutput(loss=loss, logits=logits, **extras), return_dict)


class GPTBertForQuestionAnswering(_Classifier):
    """Finds the answer to a question in a text: scores of each token as its first and as its last one."""

    num_classes = 2

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> QuestionAnsweringModelOutput | tuple[Tensor, ...]:
        """Start and end logits [B, T] each, and the mean loss if there are positions [B]; those outside are ignored."""
        causal = self.config.is_decoder
        options = (output_hidden_states, output_attentions, inputs_embeds, token_type_ids)
        hidden_states, extras = self.encode(input_ids, attention_mask, causal, None, *options)
        start, end = (logits.contiguous() for logits in self.head(hidden_states).unbind(dim=-1))
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = span_loss(start, end, start_positions, end_positions)
        output = QuestionAnsweringModelOutput(loss=loss, start_logits=start, end_logits=end, **extras)
        return self.returned(output, return_dict)


class GPTBertForMultipleChoice(_Classifier):
    """Chooses among texts, each scored by the representation that `GPTBertForSequenceClassification` reads."""

    num_classes = 1

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> MultipleChoiceModelOutput | tuple[Tensor, ...]:
        """Logits [B, choices], and the mean loss if there are labels [B].

        Args:
            input_ids: [B, choices, T].
            attention_mask: [B, choices, T].
            labels: the right choice's index.
            output_hidden_states: None uses the configuration's; shapes have B · choices rows.
            output_attentions: None uses the configuration's; likewise.
            return_dict: False returns a tuple.
            inputs_embeds: [B, choices, T, D].
            token_type_ids: zeros.
        """
        given: Any = input_ids if inputs_embeds is None else inputs_embeds
        causal = self.config.is_decoder
        ids, mask, embeds, types = (
            None if each is None else each.flatten(0, 1)
            for each in (input_ids, attention_mask, inputs_embeds, token_type_ids)
        )
        mask = attended(mask)
        options = (output_hidden_states, output_attentions, embeds, types)
        hidden_states, extras = self.encode(ids, mask, causal, None, *options)
        logits = self.head(text_state(hidden_states, mask, causal)).view(given.shape[:2])
        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        return self.returned(MultipleChoiceModelOutput(loss=loss, logits=logits, **extras), return_dict)


# so that `save_pretrained` copies this code too
GPTBertConfig.register_for_auto_class()
GPTBertModel.register_for_auto_class("AutoModel")
GPTBertForMaskedLM.register_for_auto_class("AutoModelForMaskedLM")
GPTBertForCausalLM.register_for_auto_class("AutoModelForCausalLM")
GPTBertForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
GPTBertForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
GPTBertForQuestionAnswering.register_for_auto_class("AutoModelForQuestionAnswering")
GPTBertForMultipleChoice.register_for_auto_class("AutoModelForMultipleChoice")
