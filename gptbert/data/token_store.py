"""The token file: documents of token ids on disk, memory-mapped for training.

A store is one safetensors file or a complete set of numbered shards (`train-00001-of-00003.safetensors`). Each holds

- `tokens` [num_tokens]: the ids of all documents, end to end, in the smallest unsigned type that holds the vocabulary;
- `document_offsets` [num_documents + 1] int64: document i is `tokens[document_offsets[i] : document_offsets[i + 1]]`;
- metadata: format, vocabulary size, the hash of the tokenizer that wrote it, and the number of words in the documents'
  text (`str.split()`: separated by whitespace), which older files lack.

Documents are stored without `<s>`: the packer prepends it to every piece (see `gptbert.data.packing`).

A reader memory-maps files, of many shards only those read last, and keeps none open.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from safetensors import SafetensorError

from gptbert.data.mapped_arrays import MappedArrays, lengths_of
from gptbert.data.token_shards import (
    SLICE,
    Shard,
    is_safetensors,
    numbered_shards,
    open_shard,
    shard_files,
    shard_name,
    write_shard,
)
from gptbert.errors import InputError, first_line
from gptbert.io.files import fsync_file
from gptbert.io.outputs import owned_outputs, staging_folder

SHARD_TOKENS = 50_000_000  # the writer briefly holds a shard twice: 400 MB with 4-byte ids
MOST_MAPPED = 1024  # files; two blocks of gptbert.data.document_order span about a hundred


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned type that holds the ids 0 … vocab_size − 1."""
    return np.min_scalar_type(vocab_size - 1)


@dataclass(frozen=True)
class TokenStore:
    """Read-only documents of token ids.

    Attributes:
        shards: memory-mapped token ids, one array per file; documents never cross shards.
        document_offsets: memory-mapped, [documents + 1] int64 per shard; see the module.
        vocab_size: ids are below this number.
        tokenizer_hash: `tokenizer_hash` of the writer; None for upstream's files, which have none.
        files: paths of the shards, for messages; empty if they are arrays in memory.
        num_words: words in the documents' text, separated by whitespace; None if a shard does not record it (older
            files and upstream's).
    """

    shards: Sequence[np.ndarray]
    document_offsets: Sequence[np.ndarray]
    vocab_size: int
    tokenizer_hash: str | None
    files: Sequence[str] = ()
    num_words: int | None = None
    _chunk_sizes: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False)
    # of each file when it was opened; see `_state_of`
    _states: list[tuple[int, int, int]] = field(default_factory=list, init=False, repr=False)

    @cached_property
    def shard_starts(self) -> np.ndarray:
        """[shards + 1] int64: position of each shard's first token, and the end of the last shard."""
        return np.concatenate([[0], np.cumsum(lengths_of(self.shards))])

    @cached_property
    def first_documents(self) -> np.ndarray:
        """[shards + 1] int64: index of each shard's first document, and the end of the last shard."""
        return np.concatenate([[0], np.cumsum(lengths_of(self.document_offsets) - 1)])

    @property
    def num_tokens(self) -> int:
        """Tokens in all documents, without `<s>`."""
        return int(self.shard_starts[-1])

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return int(self.first_documents[-1])

    @classmethod
    def open(cls, path: str | Path) -> "TokenStore":
        """Memory-map a token file or the set of shards named after it, or read an upstream `.bin` file.

        Raises:
            InputError: nothing exists there, a shard is missing, or a file is empty, truncated or of a different kind.
        """
        path = Path(path)
        files = [str(file) for file in shard_files(path)]  # strings: a Path takes ten times the memory
        if not is_safetensors(Path(files[0])):
            from gptbert.data.upstream_tokens import read_token_file  # noqa: PLC0415  upstream's pickles need torch, ours do not

            tokens, offsets = read_token_file(files[0])
            store = cls([tokens], [offsets], int(tokens.max(initial=0)) + 1, None, files)
        else:
            states = [_state_of(file) for file in files]  # before they are opened, so that no later change is missed

            def open_unchanged(index: int) -> Shard:
                shard = open_shard(Path(files[index]))
                if _state_of(files[index]) != states[index]:
                    raise InputError(
                        f"token file {files[index]}: is another file than the one that was opened at the start, and of "
                        f"more than {MOST_MAPPED:,} files those read last alone stay open; put the files back"
                    )
                return shard

            opened = lru_cache(MOST_MAPPED)(open_unchanged)
            sizes, writers = [], set()
            words: list[Any] = []
            for shard in map(opened, range(len(files))):
                sizes.append((len(shard.tokens), len(shard.document_offsets)))
                words.append(shard.num_words)
                writers.add((shard.vocab_size, shard.tokenizer_hash))
            if len(writers) > 1:
                raise InputError(f"token file {path}: its shards were written by different tokenizers; tokenize again")
            num_tokens, num_offsets = zip(*sizes, strict=True)
            store = cls(
                MappedArrays(lambda index: opened(index).tokens, num_tokens),
                MappedArrays(lambda index: opened(index).document_offsets, num_offsets),
                *writers.pop(),
                files,
                num_words=None if None in words else sum(words),
            )
            store._states.extend(states)
        if store.num_tokens == 0:
            raise InputError(f"token file {path}: holds no tokens; tokenize a corpus that is not empty")
        return store

    def documents(self, first: int = 0, stop: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Positions and lengths of consecutive documents.

        Args:
            first: index of the first one, counted across shards.
            stop: one past the last one; None for the end of the store.

        Returns:
            Positions of their first tokens, counted across shards, and their lengths; both [stop − first] int64.
        """
        stop = self.num_documents if stop is None else stop
        starts, lengths = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        shard = int(np.searchsorted(self.first_documents, first, side="right")) - 1
        while first < stop:
            offsets, begin = self.document_offsets[shard], first - int(self.first_documents[shard])
            end = min(begin + stop - first, len(offsets) - 1)
            starts.append(offsets[begin:end] + self.shard_starts[shard])
            lengths.append(np.diff(offsets[begin : end + 1]))
            first, shard = first + end - begin, shard + 1
        return np.concatenate(starts), np.concatenate(lengths)

    def chunk_sizes(self, chunk_documents: int) -> np.ndarray:
        """Sizes of chunks of consecutive documents. The first call reads all offsets, a slice at a time.

        Args:
            chunk_documents: documents per chunk; the last has the rest.

        Returns:
            [chunks, 2] int64: tokens, and non-empty documents.
        """
        if chunk_documents not in self._chunk_sizes:
            sizes = np.empty((-(-self.num_documents // chunk_documents), 2), np.int64)
            step = chunk_documents * max(1, SLICE // chunk_documents)
            for first in range(0, self.num_documents, step):
                _, lengths = self.documents(first, min(first + step, self.num_documents))
                borders = np.arange(0, len(lengths), chunk_documents)
                here = sizes[first // chunk_documents :][: len(borders)]
                here[:, 0] = np.add.reduceat(lengths, borders)
                here[:, 1] = np.add.reduceat(lengths > 0, borders, dtype=np.int64)
            self._chunk_sizes[chunk_documents] = sizes
        return self._chunk_sizes[chunk_documents]

    def check_ids(self, part: int = 0, parts: int = 1, most: int | None = None) -> None:
        """Read one of several equal parts of all tokens and check the ids.

        Args:
            part: index of the part, from 0.
            parts: number of parts.
            most: maximum number of tokens to read, from the beginning of the part; None for all of it.

        Raises:
            InputError: an id is not below `vocab_size`.
        """
        start, end = self.num_tokens * part // parts, self.num_tokens * (part + 1) // parts
        for first, tokens in self.slices(start, end if most is None else min(end, start + most)):
            self._check(tokens, range(first, first + len(tokens)))

    def slices(self, start: int, end: int) -> Iterator[tuple[int, np.ndarray]]:
        """Consecutive tokens, at most `SLICE` at a time, so that a signal is not kept waiting by a slow disk.

        Args:
            start: position of the first one, counted across shards.
            end: one past the last one.

        Yields:
            The position of the first of them, and their ids.
        """
        shard = int(np.searchsorted(self.shard_starts, start, side="right")) - 1
        while start < end:
            shard_start, shard_end = self.shard_starts[shard : shard + 2].tolist()
            stop = min(start + SLICE, end, shard_end)
            if stop > start:
                yield start, self.shards[shard][start - shard_start : stop - shard_start]
            start, shard = stop, shard + (stop == shard_end)

    def gather(self, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Read pieces of documents, concatenated.

        Args:
            starts: [num_pieces] int64, positions counted across shards.
            lengths: [num_pieces] int64; a piece does not cross a document boundary.

        Returns:
            The token ids [Σ lengths] and their positions in the store [Σ lengths] int64.

        Raises:
            InputError: an id is not below `vocab_size`; this covers tokens that `check_ids` did not read. Or a file is
                not what was opened.
        """
        positions = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())
        if len(self.shards) == 1:
            self._check_state(0)
            tokens = self.shards[0][positions]
        else:
            shard_of = np.minimum(np.searchsorted(self.shard_starts, starts, side="right"), len(self.shards)) - 1
            begins = starts - self.shard_starts[shard_of]
            arrays = {shard: self.shards[shard] for shard in np.unique(shard_of).tolist()}
            for shard in arrays:
                self._check_state(shard)
            pieces = zip(shard_of.tolist(), begins.tolist(), (begins + lengths).tolist(), strict=True)
            parts = [arrays[shard][begin:end] for shard, begin, end in pieces]
            tokens = np.concatenate(parts or [self.shards[0][:0]])
        self._check(tokens, positions)
        return tokens, positions

    def _check_state(self, shard: int) -> None:
        """Refuse a file that was written anew in its place, as cp does.

        Its mapping would give other text, or end the process without a word (SIGBUS) where the file is shorter now. A
        file that was deleted, or replaced by another one of its name, is still mapped as it was; of more than
        `MOST_MAPPED` files, one that must be opened again is refused by `open` then.
        """
        if not self._states:
            return
        with suppress(OSError):  # it was deleted, or its disk does not answer
            (inode, *now), (opened, *before) = _state_of(self.files[shard]), self._states[shard]
            if inode == opened and now != before:
                size, former = now[0], before[0]
                change = "has another time of change than"
                if size != former:
                    change = f"has {size:,} bytes, and had {former:,}"
                raise InputError(
                    f"token file {self.files[shard]}: {change} when it was opened; something has written to it since "
                    "(a new file belongs under another name)"
                )

    def _check(self, tokens: np.ndarray, positions: np.ndarray | range) -> None:
        if len(tokens) and (largest := int(tokens.max())) >= self.vocab_size:
            shard = int(np.searchsorted(self.shard_starts, positions[int(tokens.argmax())], side="right")) - 1
            file = f"token file {self.files[shard]}: " if self.files else ""
            raise InputError(f"{file}token id {largest} in a store of {self.vocab_size} ids; tokenize the corpus again")


def _state_of(file: str) -> tuple[int, int, int]:
    """Inode, bytes, and the time of the last change to them: a new file may get the inode of one that was deleted."""
    now = Path(file).stat()
    return now.st_ino, now.st_size, now.st_mtime_ns


class TokenStoreWriter:
    """Writes a token store, shard by shard, with memory bounded by one shard.

    Use it as a context manager: the output appears, complete and fsynced, when the block ends without an exception;
    after an exception nothing is left behind, and an older output of the same name is untouched.

    Attributes:
        num_tokens: tokens appended so far.
        num_documents: documents appended so far.
        num_words: their words, or None if not given for all.
        files: the published files, in order; empty until the block has ended.
    """

    def __init__(
        self, path: str | Path, vocab_size: int, tokenizer_hash: str, shard_tokens: int = SHARD_TOKENS
    ) -> None:
        self.path = Path(path)
        self.vocab_size = vocab_size
        self.tokenizer_hash = tokenizer_hash
        self.shard_tokens = shard_tokens
        self.num_tokens = 0
        self.num_documents = 0
        self.num_words: int | None = 0
        self._batches: list[tuple[np.ndarray, np.ndarray, int | None]] = []
        self._batched_tokens = 0
        self._written: list[Path] = []
        self.files: list[Path] = []

    def __enter__(self) -> Self:
        if self.path.is_dir():
            raise InputError(f"output {self.path}: is a folder; name a file")
        with _write_errors(self.path), ExitStack() as stack:
            stack.enter_context(owned_outputs(self.path))
            self._folder = stack.enter_context(staging_folder(self.path))
            self._ownership = stack.pop_all()
        return self

    def append(self, tokens: np.ndarray, lengths: np.ndarray, words: np.ndarray | None = None) -> None:
        """Add documents.

        A shard takes documents up to `shard_tokens`; a longer document gets its own shard. How documents are spread
        over calls does not matter.

        Args:
            tokens: [Σ lengths] ids below `vocab_size`, of any integer type, document after document.
            lengths: [num_documents] integers, tokens in each document.
            words: [num_documents] integers, words in the text of each document; None if not counted.

        Raises:
            InputError: an id is outside the vocabulary, or the disk is full.
        """
        if len(tokens) and (tokens.min() < 0 or tokens.max() >= self.vocab_size):
            raise InputError(
                f"output {self.path}: the ids reach from {tokens.min()} to {tokens.max()}, outside the vocabulary of "
                f"{self.vocab_size}; use a tokenizer whose ids have no gaps"
            )
        ends = np.cumsum(lengths, dtype=np.int64)
        first = 0
        while first < len(lengths):
            start = ends[first] - lengths[first]
            room = max(self.shard_tokens - self._batched_tokens, 0)
            stop = int(np.searchsorted(ends, start + room, side="right"))
            if stop == first and self._batched_tokens:
                self._write_shard()
                continue
            stop = max(stop, first + 1)
            batch = tokens[start : ends[stop - 1]].astype(token_dtype(self.vocab_size))
            batch_words = None if words is None else int(words[first:stop].sum())
            self._batches.append((batch, lengths[first:stop].astype(np.int64), batch_words))
            self._batched_tokens += len(batch)
            first = stop
        self.num_tokens += len(tokens)
        self.num_documents += len(lengths)
        self.num_words = None if words is None or self.num_words is None else self.num_words + int(words.sum())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                if self.num_tokens == 0:
                    raise InputError(f"output {self.path}: the input holds no text, so nothing was written")
                if self._batches:
                    self._write_shard()
                self._publish()
        finally:
            self._ownership.close()

    def _write_shard(self) -> None:
        batches, lengths, words = zip(*self._batches, strict=True)
        tokens, offsets = np.concatenate(batches), np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
        del batches
        self._batches, self._batched_tokens = [], 0
        file = self._folder / f"{len(self._written):05d}.safetensors"
        num_words = None if None in words else sum(words)
        with _write_errors(self.path):
            write_shard(Shard(tokens, offsets, self.vocab_size, self.tokenizer_hash, num_words), file)
            fsync_file(file)
        self._written.append(file)

    def _publish(self) -> None:
        """Replace the output of any earlier job of this name with the finished shards.

        The first shard goes first and comes last: a set without it is none, so that a kill among the renames leaves no
        mixture of two corpora.
        """
        old = [file for file in [self.path, *numbered_shards(self.path)] if file.exists()]
        count = len(self._written)
        names = [self.path] if count == 1 else [shard_name(self.path, i + 1, count) for i in range(count)]
        with _write_errors(self.path):
            if count > 1:
                names[0].unlink(missing_ok=True)
            for file, name in reversed(list(zip(self._written, names, strict=True))):
                file.replace(name)
            for file in old:
                if file not in names:
                    file.unlink()
            fsync_file(self.path.parent)
        self.files = names


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    """Turn write errors into InputError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"output {path}: cannot be written ({reason})") from error
