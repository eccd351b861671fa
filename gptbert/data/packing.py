"""Rows of tokens: documents shuffled per epoch and packed end to end, each row addressable by number.

An epoch of one objective is a stream: the documents in shuffled order (`document_order`), each followed by the
`<s>` that leads the next one, padded before its last `<s>` to a multiple of seq_length. The stream is split into
*slots* of seq_length tokens; a row is `<s>` followed by one slot (or two or four, once rows have grown). Slots are
numbered across epochs, so a row is a pure function of (seed, objective, slot): any process can make any row, and
resuming needs no replay.

    documents  a a a a a   b b   c c c c          seq_length 4
    stream     a a a a | a S b b | S c c c | c P P S
    rows     S a a a a,  S a S b b,  S S c c c,  S c P P S          S = <s>, P = <pad>
"""

from dataclasses import dataclass

import numpy as np

from gptbert.data.document_order import SIZES, DocumentOrder, ShuffleSizes
from gptbert.data.token_store import TokenStore
from gptbert.text.special_tokens import BOS_ID, PAD_ID


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of width W = tokens per row + 1: one more than the model's T, to shift the labels.

    Attributes:
        tokens: [B, W] int64.
        document_ids: [B, W] int64, counted from 0 in each row; −1 for padding.
        row_ids: [B] int64, unique within an objective.
        positions: [B, W] int64, each token's position in the store; −1 for `<s>` and padding.
    """

    tokens: np.ndarray
    document_ids: np.ndarray
    row_ids: np.ndarray
    positions: np.ndarray


@dataclass(frozen=True)
class Position:
    """A place in the stream of a corpus: `epoch` whole epochs and `offset` tokens of the next one lie before it."""

    epoch: int = 0
    offset: int = 0

    def words(self, num_words: int, length: int) -> int:
        """Words behind it, rounded down, if each of an epoch's `length` tokens counts the same fraction of its words.

        Whole epochs are exact; within one it is an estimate, for which no documents are read.
        """
        return self.epoch * num_words + self.offset * num_words // max(1, length)

    def epochs(self, length: int) -> float:
        """Epochs behind it, of `length` tokens."""
        return self.epoch + self.offset / max(1, length)


class RowStream:
    """All rows of one objective.

    Args:
        store: the documents; empty ones are omitted.
        seq_length: tokens per slot, T.
        seed: numbers that seed the shuffle, such as (seed, objective).
        shuffle: False keeps the documents in the store's order in every epoch.
        sizes: of the shuffle's chunks and blocks; they bound the stream's memory.
        start: the place where the first slot begins; the rest of its epoch is cut into slots from there.
        first_slot: the number of that slot.

    Attributes:
        slots_per_epoch: of whole epochs.
    """

    def __init__(
        self,
        store: TokenStore,
        seq_length: int,
        seed: tuple[int, ...] = (0,),
        shuffle: bool = True,
        sizes: ShuffleSizes = SIZES,
        start: Position = Position(),
        first_slot: int = 0,
    ) -> None:
        self.store = store
        self.seq_length = seq_length
        self.document_order = DocumentOrder(store, seed, shuffle, sizes)
        self.slots_per_epoch = -(-self.document_order.stream_length // seq_length)
        self._start, self._first_slot = start, first_slot
        self._slots_of_first_epoch = -(-(self.document_order.stream_length - start.offset) // seq_length)

    def rows(self, first_slot: int, num_rows: int, length_factor: int = 1) -> Rows:
        """Rows that cover the slots first_slot … first_slot + num_rows · length_factor − 1.

        Args:
            first_slot: counted from 0 across epochs.
            num_rows: B.
            length_factor: slots per row; the rows are length_factor · seq_length + 1 wide.

        Raises:
            InputError: a token id is outside the store's vocabulary.
        """
        end = first_slot + num_rows * length_factor
        chunks = []
        slot = first_slot
        while slot < end:
            place = self.place(slot)
            left = -(-(self.document_order.stream_length - place.offset) // self.seq_length)
            count = min(end - slot, left)
            chunks.append(self._stream(place.epoch, place.offset, place.offset + count * self.seq_length))
            slot += count
        width = length_factor * self.seq_length
        streams = chunks[0] if len(chunks) == 1 else [np.concatenate(parts) for parts in zip(*chunks, strict=True)]
        tokens, positions = (stream.reshape(num_rows, width) for stream in streams)
        tokens = np.concatenate([np.full((num_rows, 1), BOS_ID), tokens], axis=1)
        positions = np.concatenate([np.full((num_rows, 1), -1), positions], axis=1)
        inserted = positions < 0
        padding = inserted & (tokens == PAD_ID)
        document_ids = np.cumsum(inserted & ~padding, axis=1) - 1
        document_ids[padding] = -1
        row_ids = np.arange(first_slot, end, length_factor)
        return Rows(tokens, document_ids, row_ids, positions)

    def place(self, slot: int) -> Position:
        """Where a slot begins."""
        slot -= self._first_slot
        if slot < self._slots_of_first_epoch:
            return Position(self._start.epoch, self._start.offset + slot * self.seq_length)
        epochs, slot = divmod(slot - self._slots_of_first_epoch, self.slots_per_epoch)
        return Position(self._start.epoch + 1 + epochs, slot * self.seq_length)

    def places(self, slot: int) -> list[Position]:
        """Like `Mixture.places`, of a single corpus."""
        return [self.place(slot)]

    def rows_before(self, slot: int) -> int:
        """Like `Mixture.rows_before`: nothing is dealt."""
        del slot
        return 0

    def _stream(self, epoch: int, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and store positions of the slots that begin at `start` and end before `end` in an epoch's stream."""
        tokens = np.full(end - start, BOS_ID)
        positions = np.full(end - start, -1)
        is_content = np.ones(end - start, dtype=bool)
        # the documents that overlap the range, and the part of each inside it
        sources, bounds = self.document_order.between(epoch, start, end)
        begins, ends = bounds[:-1], bounds[1:]  # ends include the `<s>` after each document
        skipped = np.maximum(start - begins, 0)
        kept = np.minimum(ends - 1, end) - begins - skipped
        is_content[ends[ends <= end] - 1 - start] = False
        filled = int(min(end, ends[-1]) - start)
        is_content[filled:] = False
        tokens[is_content], positions[is_content] = self.store.gather(sources + skipped, kept)
        if end >= self.document_order.stream_length:
            # the last document's `<s>` moves after the padding, to lead the next epoch
            tokens[filled - 1 : -1] = PAD_ID
        return tokens, positions
