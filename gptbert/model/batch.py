"""A batch: rows of both objectives, as the model takes them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from gptbert.text.special_tokens import PAD_ID
from kernels import IGNORE_INDEX


@dataclass(frozen=True)
class Batch:
    """Rows of tokens and their labels; `batch[first::step]` is a batch of some of the rows.

    Attributes:
        input_ids: [B, T] integers.
        document_ids: [B, T] integers; positions attend only to their own document, and −1 (padding) to nothing.
        labels: [B, T] integers, −100 for no label; already shifted: position t predicts labels[t].
        num_masked: number of rows of masked language modeling, which come first; the others are causal.
        most_labels: an upper bound on the number of labels, which avoids a device sync to count them; None: counted.
    """

    input_ids: Tensor
    document_ids: Tensor
    labels: Tensor
    num_masked: int
    most_labels: int | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice) -> "Batch":
        tensors = (self.input_ids, self.document_ids, self.labels)
        # contiguous, so that every micro-batch is the same operations
        input_ids, document_ids, labels = (tensor[rows].contiguous() for tensor in tensors)
        return Batch(input_ids, document_ids, labels, num_masked=len(range(self.num_masked)[rows]))

    @property
    def shape(self) -> tuple[int, int, int, int | None]:
        """What a forward's operations depend on: B, T, the number of masked rows, and that of most labels."""
        return *self.labels.shape, self.num_masked, self.most_labels

    def clone(self) -> "Batch":
        """A batch of the same contents in tensors of its own."""
        return replace(
            self,
            input_ids=self.input_ids.clone(),
            document_ids=self.document_ids.clone(),
            labels=self.labels.clone(),
        )

    def copy_(self, other: "Batch") -> None:
        """Take the contents of a batch of the same `shape`."""
        self.input_ids.copy_(other.input_ids)
        self.document_ids.copy_(other.document_ids)
        self.labels.copy_(other.labels)

    @property
    def objectives(self) -> Tensor:
        """[B] int64: of each row its objective's index in `Objective`."""
        return self.is_causal.long()

    @cached_property
    def is_causal(self) -> Tensor:
        """[B] bool: whether each row's attention is causal."""
        return torch.arange(len(self), device=self.labels.device) >= self.num_masked

    @property
    def label_counts(self) -> Tensor:
        """[objectives] int64, on the device."""
        labeled = self.labels != IGNORE_INDEX
        return torch.stack([labeled[: self.num_masked].sum(), labeled[self.num_masked :].sum()])

    @classmethod
    def cat(cls, batches: Sequence["Batch"]) -> "Batch":
        """The rows of several batches, in this order.

        Raises:
            ValueError: a causal row comes before a masked one.
        """
        if len(batches) == 1:
            return batches[0]
        if any(before.num_masked < len(before) and after.num_masked for before, after in pairwise(batches)):
            raise ValueError("rows of masked language modeling come first")
        return cls(
            torch.cat([batch.input_ids for batch in batches]),
            torch.cat([batch.document_ids for batch in batches]),
            torch.cat([batch.labels for batch in batches]),
            num_masked=sum(batch.num_masked for batch in batches),
        )

    @classmethod
    def padding(cls, length: int, device: torch.device) -> "Batch":
        """A row of padding: a rank without rows must still take part in the collectives."""
        return cls(
            input_ids=torch.full((1, length), PAD_ID, device=device),
            document_ids=torch.full((1, length), -1, device=device),
            labels=torch.full((1, length), IGNORE_INDEX, device=device),
            num_masked=1,
        )
