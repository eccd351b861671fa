"""The two objectives: inputs and labels of each, built from rows of tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gptbert.config import TrainConfig
from gptbert.model.batch import Batch
from gptbert.text.special_tokens import BOS_ID, MASK_ID
from kernels import IGNORE_INDEX, span_mask


@dataclass(frozen=True)
class Masking:
    """Parameters of masked language modeling at one step; see `kernels.span_mask`."""

    mask_p: float
    random_p: float
    keep_p: float
    vocab_size: int
    num_special_tokens: int
    seed: int

    @classmethod
    def of(cls, config: TrainConfig, vocab_size: int, *, mask_p: float, seed: int) -> "Masking":
        """The run's settings, with the mask fraction and the seed of a step."""
        return cls(mask_p, config.mask_random_p, config.mask_keep_p, vocab_size, config.n_special_tokens, seed)


def causal_batch(tokens: Tensor, document_ids: Tensor) -> Batch:
    """CLM: every token but `<s>` and padding is a label (docs/model.md#causal-objective).

    Args:
        tokens: [B, T + 1].
        document_ids: [B, T + 1], −1 for padding.
    """
    labels = torch.where((tokens == BOS_ID) | (document_ids < 0), IGNORE_INDEX, tokens)
    return Batch(tokens[:, :-1], document_ids[:, :-1], labels[:, 1:], num_masked=0)


def masked_batch(
    tokens: Tensor, document_ids: Tensor, row_ids: Tensor, masking: Masking, mask_counts: Tensor | None = None
) -> Batch:
    """MLM with span masking: selected tokens are labels, each predicted from the position before it.

    Args:
        tokens: [B, T + 1].
        document_ids: [B, T + 1].
        row_ids: [B], keys of the masks' random numbers.
        masking: fractions, vocabulary and seed.
        mask_counts: [B, T + 1], how often each token was masked before, or None.
    """
    inputs, labels = span_mask(
        tokens,
        mask_p=masking.mask_p,
        random_p=masking.random_p,
        keep_p=masking.keep_p,
        mask_token_id=MASK_ID,
        vocab_size=masking.vocab_size,
        num_special_tokens=masking.num_special_tokens,
        seed=masking.seed,
        row_ids=row_ids,
        mask_counts=mask_counts,
    )
    return Batch(inputs[:, :-1], document_ids[:, :-1], labels[:, 1:], num_masked=len(inputs))
