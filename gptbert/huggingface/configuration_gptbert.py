# SPDX-License-Identifier: Apache-2.0
"""Configuration of GPT-BERT for transformers, 4.51 and newer."""

from typing import Any

from transformers import PretrainedConfig


class GPTBertConfig(PretrainedConfig):
    """Shape of a GPT-BERT (Charpentier & Samuel 2024, arXiv 2410.24159), and options of its transformers classes.

    Args:
        vocab_size: V.
        hidden_size: D.
        intermediate_size: I, of the feed-forward.
        num_hidden_layers: L.
        num_attention_heads: H.
        max_position_embeddings: distances from here on share one bucket; longer inputs work.
        position_bucket_size: S; there are 2S − 1 vectors of relative positions.
        attention_probs_dropout_prob: in training.
        hidden_dropout_prob: in training.
        layer_norm_eps: of every LayerNorm.
        classifier_dropout: of the heads for classification; None uses `hidden_dropout_prob`.
        is_decoder: attend only to earlier positions, in `AutoModel` and the classifiers. The masked language model
            never does, the causal one always.
        shift_masked_logits: whether `AutoModelForMaskedLM` returns the scores of token t at position t, as users of
            masked language models expect. The model is trained to predict a masked token from the position *before*
            it; False returns the scores where the model computes them, for evaluations that shift by themselves.
        masked_logits_alignment: in files only, what `shift_masked_logits` means: "token" or "previous".
        use_cache: whether the causal model returns keys and values for the next step of `generate`.
        bos_token_id: `<s>`, at the start of every text.
        eos_token_id: `</s>`; not used in training.
        pad_token_id: `<pad>`.
        mask_token_id: `<mask>`.
        tie_word_embeddings: the output matrix is the embedding.
        kwargs: for `PretrainedConfig`.

    Raises:
        ValueError: `masked_logits_alignment` contradicts `shift_masked_logits`.
    """

    model_type = "gptbert"

    def __init__(
        self,
        vocab_size: int = 16384,
        hidden_size: int = 768,
        intermediate_size: int = 2560,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        max_position_embeddings: int = 512,
        position_bucket_size: int = 32,
        attention_probs_dropout_prob: float = 0.1,
        hidden_dropout_prob: float = 0.1,
        layer_norm_eps: float = 1e-5,
        classifier_dropout: float | None = None,
        is_decoder: bool = False,
        shift_masked_logits: bool = True,
        masked_logits_alignment: str | None = None,
        use_cache: bool = True,
        bos_token_id: int = 1,
        eos_token_id: int = 2,
        pad_token_id: int = 3,
        mask_token_id: int = 4,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.position_bucket_size = position_bucket_size
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.hidden_dropout_prob = hidden_dropout_prob
        self.layer_norm_eps = layer_norm_eps
        self.classifier_dropout = classifier_dropout
        self.shift_masked_logits = shift_masked_logits
        self.use_cache = use_cache
        self.mask_token_id = mask_token_id
        super().__init__(
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )
        self.is_decoder = is_decoder
        if masked_logits_alignment not in {None, self.masked_logits_alignment}:
            raise ValueError(
                f"config.json: shift_masked_logits is {str(shift_masked_logits).lower()}, which is "
                f'"masked_logits_alignment": "{self.masked_logits_alignment}", not "{masked_logits_alignment}"; '
                "change both"
            )

    @property
    def masked_logits_alignment(self) -> str:
        """Where `AutoModelForMaskedLM` has the scores of a token: at its position, or at the previous one.

        "token": BabyLM's evaluation reads them with `--backend mlm`; "previous": with `--backend mntp`.
        """
        return "token" if self.shift_masked_logits else "previous"

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, with `masked_logits_alignment`."""
        return {**super().to_dict(), "masked_logits_alignment": self.masked_logits_alignment}
