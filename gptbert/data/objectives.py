"""The two objectives: inputs and labels of each, built from rows of tokens."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from gptbert.model.batch import Batch
from gptbert.text.special_tokens import BOS_ID, MASK_ID
from kernels import IGNORE_INDEX, span_mask


@dataclass(frozen=True)
class Masking:
    """Parameters of masked language modeling at one step; see `kernels.span_mask`.

    Attributes:
        mask_p: expected fraction of the ordinary tokens that are selected.
        random_p: fraction of these that are replaced by a random ordinary token.
        keep_p: fraction that stays unchanged.
        vocab_size: the tokenizer's; larger ids do not occur.
        special_ids: ascending, with 0 … 4 among them; all other tokens are ordinary.
        seed: of the masks.
    """

    mask_p: float
    random_p: float
    keep_p: float
    vocab_size: int
    special_ids: tuple[int, ...]
    seed: int


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
    special_ids = masking.special_ids
    are_in_front = special_ids == tuple(range(len(special_ids)))
    if not are_in_front:
        places, ids = _special_first(masking.vocab_size, special_ids, tokens.device)
        tokens = places[tokens]
    inputs, labels = span_mask(
        tokens,
        mask_p=masking.mask_p,
        random_p=masking.random_p,
        keep_p=masking.keep_p,
        mask_token_id=MASK_ID,
        vocab_size=masking.vocab_size,
        num_special_tokens=len(special_ids),
        seed=masking.seed,
        row_ids=row_ids,
        mask_counts=mask_counts,
    )
    if not are_in_front:
        inputs, labels = ids[inputs], torch.where(labels == IGNORE_INDEX, labels, ids[labels.clamp(min=0)])
    return Batch(inputs[:, :-1], document_ids[:, :-1], labels[:, 1:], num_masked=len(inputs))


@functools.lru_cache(maxsize=8)
def _special_first(vocab_size: int, special_ids: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """For `span_mask`, in which special ids come first: each id's place in that order, and the id of each place.

    `<mask>` keeps its place, because the ids 0 … 4 are special.
    """
    is_ordinary = torch.ones(vocab_size, dtype=torch.bool)
    is_ordinary[list(special_ids)] = False
    ids = is_ordinary.to(torch.int8).argsort(stable=True)
    return ids.argsort().to(device), ids.to(device)
