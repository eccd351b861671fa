"""Several corpora as one stream of rows, each corpus with its fraction of the tokens.

Rows are dealt to the corpora one by one, and each corpus supplies its own rows in order, epoch after epoch (`packing`).
Of the first n rows, the corpus with the largest fraction gets that fraction of n, rounded; of the rows that remain, the
next corpus gets its fraction, rounded; and so on.

    fractions 1/2, 1/4, 1/4  row      0  1  2  3  4  5  6  7  8
                             corpus   A  B  A  C  A  B  A  C  A

The corpus of a row follows from counts, not from random draws. So every step has the fractions to within a row or so,
with less noise than draws; no corpus skips or repeats a slot within an epoch; and the corpus of any row, and the number
of that corpus's earlier rows, can be computed without state. Randomness comes from shuffling documents in each corpus.

A row is from a single corpus, even after rows have grown to two or four slots. Adjacent slots of different corpora
would need an `<s>` between them, which rows have no room for: slots begin in the middle of documents.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gptbert.data.packing import Position, Rows, RowStream

_ROUND = 2**30  # rows per period, about: fractions are exact to one row per period


@dataclass(frozen=True)
class _Stretch:
    """Rows of one length."""

    first_slot: int
    length_factor: int
    first_row: int
    origin: np.ndarray  # [corpora], slots minus length_factor · rows, before this stretch

    def row(self, slot: int) -> int:
        """The row that begins at a slot."""
        return self.first_row + (slot - self.first_slot) // self.length_factor

    def slots(self, counts: np.ndarray) -> np.ndarray:
        """Each corpus's slots after this many of its rows, both [corpora]."""
        return self.origin + self.length_factor * counts


class Mixture:
    """All rows of one objective, from several corpora; like `RowStream`, with slots counted over all corpora.

    Args:
        streams: one per corpus, of the same seq_length.
        weights: relative weights in tokens, positive; empty for the corpora's sizes, so that all epochs end together.
        growth: (first slot, slots per row from there on) of each row length, in order, beginning with the mixture's
            first slot. With the number of a corpus's rows it determines the number of its slots.
        rows: dealt before the first slot. The streams' own slots are counted from that slot on.

    Attributes:
        shares: [corpora] fractions of all tokens; their sum is 1.
    """

    def __init__(
        self,
        streams: Sequence[RowStream],
        weights: Sequence[float] = (),
        growth: Sequence[tuple[int, int]] = ((0, 1),),
        rows: int = 0,
    ) -> None:
        self.streams = streams
        sizes = [stream.slots_per_epoch for stream in streams]
        scaled = np.array(weights or sizes, dtype=float)
        scaled /= scaled.max()  # the sum of large weights may overflow
        self.shares = scaled / scaled.sum()
        parts = np.maximum(1, np.rint(_ROUND * self.shares).astype(np.int64))  # rows per period
        self._parts = {int(corpus): int(parts[corpus]) for corpus in np.argsort(-parts, kind="stable")}
        self._first_positions = np.cumsum([0, *(stream.store.num_tokens for stream in streams)])
        slot, length_factor = growth[0]
        dealt = self._dealt(np.array([rows]))[:, 0]
        self._stretches = [_Stretch(slot, length_factor, rows, -length_factor * dealt)]
        for slot, length_factor in growth[1:]:
            row, counts, slots = self._before(slot)
            self._stretches.append(_Stretch(slot, length_factor, row, slots - length_factor * counts))

    def rows(self, first_slot: int, num_rows: int, length_factor: int = 1) -> Rows:
        """See `RowStream.rows`; `positions` index the concatenated stores of all corpora.

        Raises:
            InputError: a token id is outside its store's vocabulary.
            ValueError: rows have a different length there, or none begins there.
        """
        stretch = self._stretch(first_slot)
        if stretch.length_factor != length_factor or (first_slot - stretch.first_slot) % length_factor:
            raise ValueError(f"no row of {length_factor} slots begins at slot {first_slot}")
        counts = self._dealt(stretch.row(first_slot) + np.arange(num_rows + 1))
        starts = stretch.slots(counts[:, 0])
        is_of = np.diff(counts, axis=1) > 0  # [corpora, B]
        width = length_factor * self.streams[0].seq_length + 1
        tokens, document_ids, positions = np.empty((3, num_rows, width), np.int64)
        for corpus in np.flatnonzero(is_of.any(axis=1)).tolist():
            here = is_of[corpus]
            rows = self.streams[corpus].rows(int(starts[corpus]), int(np.count_nonzero(here)), length_factor)
            tokens[here], document_ids[here] = rows.tokens, rows.document_ids
            positions[here] = np.where(rows.positions < 0, -1, rows.positions + self._first_positions[corpus])
        return Rows(tokens, document_ids, first_slot + length_factor * np.arange(num_rows), positions)

    def places(self, slot: int) -> list[Position]:
        """Where each corpus's next slot begins, for the rows from `slot` on."""
        _, _, slots = self._before(slot)
        return [stream.place(count) for stream, count in zip(self.streams, slots.tolist(), strict=True)]

    def rows_before(self, slot: int) -> int:
        """Rows dealt before `slot`, since the run's beginning."""
        return self._before(slot)[0]

    def _stretch(self, slot: int) -> _Stretch:
        return next(stretch for stretch in reversed(self._stretches) if stretch.first_slot <= slot)

    def _before(self, slot: int) -> tuple[int, np.ndarray, np.ndarray]:
        """Counts before the row that begins at a slot: rows, and rows and slots of each corpus [corpora]."""
        stretch = self._stretch(slot)
        counts = self._dealt(np.array([stretch.row(slot)]))[:, 0]
        return stretch.row(slot), counts, stretch.slots(counts)

    def _dealt(self, rows: np.ndarray) -> np.ndarray:
        """How many of the first `rows` rows each corpus gets; [n] to [corpora, n].

        One more row must be exactly one more row of one corpus. Integers, unlike floats, guarantee it: as part ≤ rest,
        one more row means 0 or 1 more taken, and 1 or 0 more left.
        """
        counts = np.empty((len(self._parts), len(rows)), np.int64)
        rest = sum(self._parts.values())
        rounds, left = np.divmod(rows, rest)
        for corpus, part in self._parts.items():
            taken = (2 * left * part + rest) // (2 * rest)  # left · part / rest, rounded; the product is below 2^62
            counts[corpus] = rounds * part + taken
            left, rest = left - taken, rest - part
        return counts
