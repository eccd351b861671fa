# SPDX-License-Identifier: Apache-2.0
"""Heads of GPT-BERT's models and their losses, for modeling_gptbert.py.

Letters of shapes: B rows, T positions, D hidden.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_gptbert import GPTBertConfig
from .layers_gptbert import layer_norm


class Head(nn.Module):
    """Representations to scores of tokens, or of classes.

    Args:
        config: the model's.
        num_scores: per position.
        dropout: probability of zeroing an element before the last layer.
    """

    def __init__(self, config: GPTBertConfig, num_scores: int, dropout: float) -> None:
        super().__init__()
        self.nonlinearity = nn.Sequential(
            layer_norm(config.hidden_size, config),
            nn.Linear(config.hidden_size, config.hidden_size),
            nn.GELU(),
            layer_norm(config.hidden_size, config),
            nn.Dropout(dropout),
            nn.Linear(config.hidden_size, num_scores),
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., D] to [..., num_scores]."""
        return self.nonlinearity(hidden_states)


def text_state(hidden_states: Tensor, attention_mask: Tensor | None, is_decoder: bool) -> Tensor:
    """The representation [B, D] of each row's `<s>`, or of its last token if attention is causal, from [B, T, D].

    Args:
        hidden_states: [B, T, D].
        attention_mask: bool; of other shapes than [B, T] it says nothing about padding, and None neither.
        is_decoder: whether attention is causal.
    """
    last = hidden_states.shape[1] - 1
    if attention_mask is None or attention_mask.ndim != 2:
        return hidden_states[:, last if is_decoder else 0]
    present = attention_mask.long()
    position = last - present.flip(-1).argmax(dim=-1) if is_decoder else present.argmax(dim=-1)
    return hidden_states[torch.arange(len(hidden_states), device=hidden_states.device), position]


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of logits [B, T, classes] and labels [B, T], −100 to ignore."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def text_loss(logits: Tensor, labels: Tensor, config: GPTBertConfig) -> Tensor:
    """The loss of logits [B, num_labels], by `config.problem_type`, else by the labels' dtype and `num_labels`."""
    problem = config.problem_type
    if problem is None and config.num_labels == 1:
        problem = "regression"
    elif problem is None:
        problem = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
    if problem == "regression":
        return F.mse_loss(logits.float().view_as(labels), labels.float())
    if problem == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits.float(), labels.float())
    return F.cross_entropy(logits.float(), labels)


def span_loss(start_logits: Tensor, end_logits: Tensor, start_positions: Tensor, end_positions: Tensor) -> Tensor:
    """Mean of the cross-entropies of a span's two ends.

    Args:
        start_logits: [B, T].
        end_logits: [B, T].
        start_positions: [B] or [B, 1], the first token of each answer; positions outside of the row are ignored.
        end_positions: likewise, the last token.
    """
    length = start_logits.shape[1]
    losses = []
    for logits, positions in ((start_logits, start_positions), (end_logits, end_positions)):
        inside = positions.view(-1).clamp(0, length)  # as transformers' models do
        losses.append(F.cross_entropy(logits.float(), inside, ignore_index=length))
    return (losses[0] + losses[1]) / 2
