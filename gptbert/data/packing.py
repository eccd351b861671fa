"""Rows of tokens: documents shuffled per epoch, packed end to end, found again from a number alone.

An epoch of one objective is a stream: the documents in shuffled order (`document_order`), each followed by the
`<s>` that leads the next one, padded before its last `<s>` to a multiple of seq_length. The stream is cut into *slots*
of seq_length tokens; a row is `<s>` followed by one slot (or by two or four where rows have grown). Slots are numbered
through all epochs, so a row is a pure function of (seed, objective, slot): any process can make any row, and resuming
needs no replay.

    documents  a a a a a   b b   c c c c          seq_length 4
    stream     a a a a | a S b b | S c c c | c P P S
    rows     S a a a a,  S a S b b,  S S c c c,  S c P P S          S = <s>, P = <pad>
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, Self, TypeVar

import numpy as np

from gptbert.data.document_order import SIZES, DocumentOrder, ShuffleSizes
from gptbert.data.token_store import TokenStore
from gptbert.text.tokenizer import BOS_ID, PAD_ID

T = TypeVar("T")


@dataclass(frozen=True)
class Rows:
    """Consecutive rows, W = tokens per row + 1 wide: one more than the model's T, for the labels' shift.

    Attributes:
        tokens: [B, W] int64.
        document_ids: [B, W] int64, counted from 0 in each row; −1 for padding.
        row_ids: [B] int64, unique for each row of an objective.
        positions: [B, W] int64, where in the store each token stands; −1 for `<s>` and padding.
    """

    tokens: np.ndarray
    document_ids: np.ndarray
    row_ids: np.ndarray
    positions: np.ndarray


class RowStream:
    """All rows of one objective.

    Args:
        store: the documents; empty ones are left out.
        seq_length: tokens per slot, T.
        seed: numbers that select the shuffling, such as (seed, objective).
        shuffle: False keeps the documents in the store's order in every epoch.
        sizes: of the shuffle's chunks and blocks; they bound what the stream holds in memory.
    """

    def __init__(
        self,
        store: TokenStore,
        seq_length: int,
        seed: tuple[int, ...] = (0,),
        shuffle: bool = True,
        sizes: ShuffleSizes = SIZES,
    ) -> None:
        self.store = store
        self.seq_length = seq_length
        self.document_order = DocumentOrder(store, seed, shuffle, sizes)
        self.slots_per_epoch = -(-self.document_order.stream_length // seq_length)

    def rows(self, first_slot: int, num_rows: int, length_factor: int = 1) -> Rows:
        """Rows that cover the slots first_slot … first_slot + num_rows · length_factor − 1.

        Args:
            first_slot: counted from 0 through all epochs.
            num_rows: B.
            length_factor: slots per row; the rows are length_factor · seq_length + 1 wide.

        Raises:
            InputError: a token id is outside the store's vocabulary.
        """
        end = first_slot + num_rows * length_factor
        chunks = []
        slot = first_slot
        while slot < end:
            epoch, slot_in_epoch = divmod(slot, self.slots_per_epoch)
            stop = min(end - epoch * self.slots_per_epoch, self.slots_per_epoch)
            chunks.append(self._stream(epoch, slot_in_epoch, stop))
            slot = epoch * self.slots_per_epoch + stop
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

    def words_before(self, slot: int) -> int | None:
        """Words in the slots before this one, counted from 0 through all epochs; None where the store does not know.

        Every slot stands for the same share of an epoch's words: an epoch has them all, and within one the number is an
        estimate, rounded down, that no process needs to read documents for.
        """
        words = self.store.num_words
        return None if words is None else slot * words // self.slots_per_epoch

    def _stream(self, epoch: int, first: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and store positions of the slots first … stop − 1 of an epoch."""
        start, end = first * self.seq_length, stop * self.seq_length
        tokens = np.full(end - start, BOS_ID)
        positions = np.full(end - start, -1)
        is_content = np.ones(end - start, dtype=bool)
        # the documents that reach into the range, and of each the part inside it
        sources, bounds = self.document_order.between(epoch, start, end)
        begins, ends = bounds[:-1], bounds[1:]  # ends count the `<s>` behind each document
        skipped = np.maximum(start - begins, 0)
        kept = np.minimum(ends - 1, end) - begins - skipped
        is_content[ends[ends <= end] - 1 - start] = False
        filled = int(min(end, ends[-1]) - start)
        is_content[filled:] = False
        tokens[is_content], positions[is_content] = self.store.gather(sources + skipped, kept)
        if stop == self.slots_per_epoch:
            # the last document's `<s>` moves behind the padding, so that it leads the next epoch
            tokens[filled - 1 : -1] = PAD_ID
        return tokens, positions


class Prefetcher(Generic[T]):
    """Computes a function of the step a few steps ahead, on a thread of its own; a context that ends the thread.

    Args:
        function: pure; called with consecutive steps.
        first_step: the first step that will be asked for.
        last_step: no step from here on is computed.
        depth: steps computed ahead.
    """

    def __init__(self, function: Callable[[int], T], first_step: int, last_step: int, depth: int = 4) -> None:
        self._function = function
        self._last_step = last_step
        self._depth = depth
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="rows")
        self._pending: dict[int, Future[T]] = {}
        self._submit_from(first_step)

    def get(self, step: int) -> T:
        """The function's value at `step`; waits if it is not ready, and raises what the function raised."""
        self._submit_from(step)
        return self._pending.pop(step).result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._worker.shutdown(cancel_futures=True)

    def _submit_from(self, step: int) -> None:
        for ahead in range(step, min(step + self._depth, self._last_step)):
            if ahead not in self._pending:
                self._pending[ahead] = self._worker.submit(self._function, ahead)
