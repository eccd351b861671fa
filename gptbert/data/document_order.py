"""The order of an epoch's documents: a two-level shuffle in memory that does not grow with the corpus.

The documents are split, in the store's order, into *chunks* of consecutive ones. An epoch permutes the chunks, groups
equally many into a *block*, and permutes the documents within each block. Its stream is the concatenated blocks.

    store     0 1 2 | 3 4 5 | 6 7 8 | 9 10 11      chunks of 3 documents
    chunks    6 7 8   0 1 2 | 9 10 11   3 4 5      permuted, in blocks of 2
    stream    1 7 0 8 2 6   | 4 11 9 5 10 3        permuted within each block

A corpus of a single block is permuted as a whole, without permuting chunks. Everything is drawn from (seed, epoch,
block), so any block can be generated from its number. With the usual `SIZES` an order holds at most

- 4.2 MB for all chunks: tokens and documents of each, read once from the offsets, shared by all orders of a store;
- 2.1 MB for each of two epochs: the order of the chunks and the starts of the blocks;
- 16.8 MB for each of two blocks, the current one and the next, which a thread prepares; about 50 MB more meanwhile.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from gptbert.data.token_store import TokenStore


@dataclass(frozen=True)
class ShuffleSizes:
    """Granularity of the shuffle, which determines the size of its tables.

    Attributes:
        chunk_documents: documents per chunk; more if there would be too many chunks.
        block_documents: documents per block, approximately: as many whole chunks as fit, at least one.
        most_chunks: maximum number of chunks.
    """

    chunk_documents: int = 2**12
    block_documents: int = 2**20
    most_chunks: int = 2**18


SIZES = ShuffleSizes()


@dataclass(frozen=True)
class _Epoch:
    chunks: np.ndarray  # [chunks]
    block_starts: np.ndarray  # [blocks + 1], in the epoch's stream


class DocumentOrder:
    """The position of each document in every epoch's stream; empty documents are omitted.

    Args:
        store: the documents.
        seed: numbers that seed the shuffle.
        shuffle: False keeps the store's order in every epoch.
        sizes: of chunks and blocks.

    Attributes:
        stream_length: tokens per epoch, including an `<s>` after each document.
    """

    def __init__(self, store: TokenStore, seed: tuple[int, ...], shuffle: bool, sizes: ShuffleSizes) -> None:
        self._store = store
        self._seed = seed
        self._shuffle = shuffle
        self._chunk_documents = max(sizes.chunk_documents, -(-store.num_documents // sizes.most_chunks))
        self._chunk_sizes = store.chunk_sizes(self._chunk_documents)
        self._chunks_per_block = max(1, sizes.block_documents // self._chunk_documents)
        self._num_blocks = -(-len(self._chunk_sizes) // self._chunks_per_block)
        self.stream_length = int(self._chunk_sizes.sum())
        self._epochs: dict[int, Future[_Epoch]] = {}
        self._blocks: dict[int, Future[tuple[np.ndarray, np.ndarray]]] = {}  # by number, counted across epochs
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="shuffle")

    def block_starts(self, epoch: int) -> np.ndarray:
        """Start of each block in an epoch's stream, and end of the last; [blocks + 1] int64."""
        return self._epoch(epoch).block_starts

    def between(self, epoch: int, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents that overlap a range of an epoch's stream.

        Args:
            epoch: from 0.
            start: first position of the range, below `stream_length`.
            end: one past its last position.

        Returns:
            Positions of the documents' first tokens in the store [n] int64, and their starts in the stream, plus the
            end of the last one's `<s>` [n + 1] int64.
        """
        block_ends = self.block_starts(epoch)[1:]
        first, last = np.searchsorted(block_ends, (start, min(end, self.stream_length) - 1), side="right").tolist()
        parts = []
        for index in range(first, last + 1):
            starts, bounds = self._block(epoch, index)
            here, stop = np.searchsorted(bounds[1:], (start, end - 1), side="right").tolist()
            parts.append((starts[here : stop + 1], bounds[here : stop + 2]))
        if len(parts) == 1:
            return parts[0]
        return (
            np.concatenate([starts for starts, _ in parts]),
            np.concatenate([parts[0][1], *(bounds[1:] for _, bounds in parts[1:])]),
        )

    def _epoch(self, epoch: int) -> _Epoch:
        """The epoch's chunks; also starts drawing the next epoch."""
        for ahead in (epoch, epoch + 1):
            if ahead not in self._epochs:
                self._epochs[ahead] = self._worker.submit(self._draw_epoch, ahead)
        for other in self._epochs.keys() - {epoch, epoch + 1}:
            del self._epochs[other]
        return self._epochs[epoch].result()

    def _block(self, epoch: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        """All documents of a block, as `between` returns them; also starts drawing the next block."""
        number = epoch * self._num_blocks + index
        for ahead in (number, number + 1):
            if ahead not in self._blocks:
                epoch, index = divmod(ahead, self._num_blocks)
                # the only worker runs tasks in order, so the epoch is drawn before the block
                self._blocks[ahead] = self._worker.submit(self._draw_block, self._epochs[epoch], epoch, index)
        for other in self._blocks.keys() - {number, number + 1}:
            self._blocks.pop(other).cancel()
        return self._blocks[number].result()

    def _draw_epoch(self, epoch: int) -> _Epoch:
        chunks = np.arange(len(self._chunk_sizes))
        if self._shuffle and self._num_blocks > 1:
            self._generator(epoch).shuffle(chunks)
        lengths = self._chunk_sizes.sum(axis=1)[chunks]
        borders = np.arange(0, len(chunks), self._chunks_per_block)
        return _Epoch(chunks, np.concatenate([[0], np.cumsum(np.add.reduceat(lengths, borders))]))

    def _draw_block(self, drawn: Future[_Epoch], epoch: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        table = drawn.result()
        chunks = table.chunks[index * self._chunks_per_block :][: self._chunks_per_block]
        firsts = chunks * self._chunk_documents
        stops = np.minimum(firsts + self._chunk_documents, self._store.num_documents)
        pieces = [self._store.documents(*span) for span in zip(firsts.tolist(), stops.tolist(), strict=True)]
        starts, lengths = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
        kept = np.flatnonzero(lengths)
        if self._shuffle:
            self._generator(epoch, *([index] if self._num_blocks > 1 else [])).shuffle(kept)
        bounds = np.cumsum(np.concatenate([table.block_starts[index : index + 1], lengths[kept] + 1]))
        return starts[kept], bounds

    def _generator(self, epoch: int, *block: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence([*self._seed, epoch], spawn_key=block)))
