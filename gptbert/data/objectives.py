"""The two objectives: inputs and labels of each, built from rows of tokens."""

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from gptbert.config import TrainConfig
from gptbert.text.special_tokens import BOS_ID, MASK_ID, PAD_ID
from kernels import IGNORE_INDEX, span_mask


class Objective(Enum):
    """Both predict the next token; they differ in the attention mask and in which tokens are labels."""

    MLM = "mlm"
    CLM = "clm"

    @property
    def causal(self) -> bool:
        """Whether attention is causal."""
        return self is Objective.CLM


@dataclass(frozen=True)
class Batch:
    """Inputs of the model's forward: three [B, T] tensors and their objective."""

    objective: Objective
    input_ids: Tensor
    document_ids: Tensor
    labels: Tensor

    @property
    def label_count(self) -> Tensor:
        """Scalar int64, on the device."""
        return (self.labels != IGNORE_INDEX).sum()

    @property
    def is_causal(self) -> Tensor:
        """[B] bool: whether each row's attention is causal."""
        return torch.full_like(self.labels[:, 0], self.objective.causal, dtype=torch.bool)

    @classmethod
    def padding(cls, length: int, device: torch.device) -> "Batch":
        """A row of padding: a rank without rows must still take part in the collectives."""
        return cls(
            Objective.MLM,
            input_ids=torch.full((1, length), PAD_ID, device=device),
            document_ids=torch.full((1, length), -1, device=device),
            labels=torch.full((1, length), IGNORE_INDEX, device=device),
        )

    def rows(self, first: int, last: int) -> "Batch":
        """Rows [first, last), clipped to the batch."""
        tensors = (self.input_ids, self.document_ids, self.labels)
        return Batch(self.objective, *(tensor[max(0, first) : max(0, last)] for tensor in tensors))


def micro_batches(batches: list[Batch], most_rows: int) -> list[list[Batch]]:
    """Split consecutive rows into micro-batches of at most `most_rows`, as equal as possible.

    Returns:
        The parts of each micro-batch: the rows it takes from each batch; batches that give it no row are left out.
    """
    total = sum(len(batch.labels) for batch in batches)
    pieces = -(-total // most_rows)
    result = []
    for piece in range(pieces):
        first, last = total * piece // pieces, total * (piece + 1) // pieces
        parts = []
        for batch in batches:
            part = batch.rows(first, last)
            parts += [part] if len(part.labels) else []
            first, last = first - len(batch.labels), last - len(batch.labels)
        result.append(parts)
    return result


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
    return Batch(Objective.CLM, tokens[:, :-1], document_ids[:, :-1], labels[:, 1:])


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
    return Batch(Objective.MLM, inputs[:, :-1], document_ids[:, :-1], labels[:, 1:])
