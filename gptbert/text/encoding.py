"""Texts to token ids: documents, streamed and using all cores; sentences; and what of a text no token has."""

import re
import unicodedata
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from tokenizers import Encoding, Tokenizer

from gptbert.errors import InputError
from gptbert.text.special_tokens import BOS_ID
from gptbert.text.tokenizer import library_errors, special_names
from gptbert.text.tokenizer_parts import is_in_form, without_normal_form, without_prefix

BATCH_BYTES = 2_000_000  # of text per call of the library, which takes some 100 bytes per token, at most one per byte
DOCUMENT_OVERHEAD = 500  # memory of a short document's objects, in bytes of text
ENCODER_THREADS = 2  # one keeps the cores busy while the other converts its results to Python objects
WAITING_BATCHES = ENCODER_THREADS + 1  # being encoded, or waiting for the main thread
_WITH_ENDS = 4096  # sentences per call of the library
WAITING_BYTES = (WAITING_BATCHES + 1) * BATCH_BYTES  # of their text, where single documents are larger than a batch
SAMPLED = 20_000  # characters at most of a document that is looked at for what its tokens do not have
FIRST = 20_000  # characters, of which every document is looked at
ONE_OF = 500  # of the characters that follow: to look at one takes three times as long as to encode it
_NAMED = 60  # characters, in a message, of a text that cannot be encoded


def encode_documents(tokenizer: Tokenizer, documents: Iterable[str]) -> Iterator[tuple[np.ndarray, ...]]:
    """Encode documents as plain text: without `<s>`, and a literal "<mask>" in them is not a mask.

    Two threads keep the library busy on all cores (it releases the GIL); meanwhile the main thread reads the next batch
    and converts the oldest one to arrays.

    Args:
        tokenizer: its settings for padding, truncation and special tokens are modified.
        documents: texts; one of many megabytes takes a hundred times its size.

    Yields:
        For each batch of documents, the concatenated ids [Σ lengths] uint32, the lengths [num_documents] int64, and the
        numbers of whitespace-separated words (`str.split()`) [num_documents] int64.
    """
    tokenizer.encode_special_tokens = True
    tokenizer.no_padding()
    tokenizer.no_truncation()
    faster, form = without_normal_form(tokenizer) or (tokenizer, None)
    faster.encode_special_tokens = True

    def encode(batch: list[str]) -> tuple[list[Encoding], list[int]]:
        in_form = [form is not None and is_in_form(text, form) for text in batch]
        encodings = {}
        for is_such, encoder in ((False, tokenizer), (True, faster)):
            part = [text for text, of_part in zip(batch, in_form, strict=True) if of_part == is_such]
            encodings[is_such] = iter(_encodings(encoder, part))
        return [next(encodings[is_such]) for is_such in in_form], [len(text.split()) for text in batch]

    waiting: deque[tuple[int, Future[tuple[list[Encoding], list[int]]]]] = deque()
    threads = ThreadPoolExecutor(ENCODER_THREADS)
    try:
        for size, batch in _batches(documents):
            waiting.append((size, threads.submit(encode, batch)))
            while len(waiting) > WAITING_BATCHES or sum(size for size, _ in waiting) > WAITING_BYTES:
                yield _to_arrays(*waiting.popleft()[1].result())
        while waiting:
            yield _to_arrays(*waiting.popleft()[1].result())
    finally:
        threads.shutdown(cancel_futures=True)


class LostText:
    """The share of a text that its tokens do not have, which the share of unknown tokens does not say.

    Unigram models and `fuse_unk` make one unknown token of any stretch, WordPiece of a word; normalizers and splitters
    may leave characters out. Some documents of a stream are looked at, each of which stands for those since the last.

    Attributes:
        share: characters other than whitespace that no token but the unknown one has, as a share of all.
    """

    def __init__(self, tokenizer: Tokenizer, unknown: int | None) -> None:
        """Begin with nothing.

        Args:
            tokenizer: set to encode documents, as `encode_documents` does.
            unknown: the id of its token for unknown text, None for none.
        """
        self._tokenizer, self._unknown = tokenizer, unknown
        self._passed = self._looked_at = self._since = 0
        self._characters = self._lost = 0.0

    @property
    def share(self) -> float:
        """See above."""
        return self._lost / max(1, self._characters)

    def watched(self, documents: Iterable[str]) -> Iterator[str]:
        """The documents, some of which are looked at as they pass; the last one too."""
        text = ""
        for text in documents:
            self._passed += len(text)
            self._since += len(text)
            if self._looked_at <= FIRST + self._passed / ONE_OF:
                self._look_at(text[:SAMPLED])
            yield text
        if self._since:
            self._look_at(text[:SAMPLED])

    def _look_at(self, sample: str) -> None:
        self._looked_at += len(sample)
        characters, lost = lost_characters(self._tokenizer, sample, self._unknown)
        self._characters += self._since * characters / len(sample)
        self._lost += self._since * lost / len(sample)
        self._since = 0


def lost_characters(tokenizer: Tokenizer, text: str, unknown: int | None) -> tuple[int, int]:
    """The number of characters of a text without whitespace and control characters, and of those that no token has."""
    text = unicodedata.normalize("NFC", text)  # of what a normalizer composes, the library knows only the first place
    (encoding,) = _encodings(tokenizer, [text], offsets=True)
    ids = np.array(encoding.ids, np.int64)
    places = np.array(encoding.offsets, np.int64).reshape(-1, 2)[ids != (-1 if unknown is None else unknown)]
    changes = np.zeros(len(text) + 1, np.int64)
    np.add.at(changes, places[:, 0], 1)
    np.add.at(changes, places[:, 1], -1)
    is_counted = {character: unicodedata.category(character)[0] not in "ZC" for character in set(text)}
    counted = np.fromiter(map(is_counted.__getitem__, text), bool, len(text))
    return int(counted.sum()), int((counted & (changes.cumsum()[:-1] == 0)).sum())


def encode_sentences(
    tokenizer: Tokenizer, sentences: Sequence[str], *, as_transformers: bool = False
) -> list[list[int]]:
    """Encode sentences as plain text, each preceded by `<s>`.

    Args:
        tokenizer: its setting for special tokens is modified.
        sentences: texts, all encoded at once.
        as_transformers: a special token's name in a text is the token, as in transformers.

    Raises:
        InputError: a text is not UTF-8.
    """
    for sentence in sentences:
        _check_text(sentence)
    tokenizer.encode_special_tokens = not as_transformers
    return [[BOS_ID, *encoding.ids] for encoding in _encodings(tokenizer, sentences)]


def encode_with_ends(tokenizer: Tokenizer, sentences: Sequence[str]) -> Iterator[tuple[list[int], list[int]]]:
    """As `encode_sentences` as transformers, with the number of characters up to each token's end, 0 for `<s>`.

    Args:
        tokenizer: its setting for special tokens is modified.
        sentences: texts.

    Raises:
        InputError: a text is not UTF-8.
    """
    for sentence in sentences:
        _check_text(sentence)
    tokenizer.encode_special_tokens = False
    for first in range(0, len(sentences), _WITH_ENDS):  # the library's objects take much more memory than the ids
        for encoding in _encodings(tokenizer, sentences[first : first + _WITH_ENDS], offsets=True):
            yield [BOS_ID, *encoding.ids], [0, *(end for _, end in encoding.offsets)]


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode a text that goes on, as plain text and preceded by `<s>`.

    Upstream's tokenizers put a space behind a line break, which is the next word's: at the end it is left out.

    Args:
        tokenizer: its setting for special tokens is modified.
        text: any text.

    Raises:
        InputError: the text is not UTF-8.
    """
    return _without_added_end(tokenizer, encode_sentences(tokenizer, [text])[0])


def encode_with_masks(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode a text, preceded by `<s>`, in which "<mask>" and other special tokens are parsed as such.

    What a tokenizer puts in front of a text it puts there only, not behind each special token.

    Args:
        tokenizer: its setting for special tokens is modified.
        text: any text.

    Raises:
        InputError: the text is not UTF-8.
    """
    _check_text(text)
    tokenizer.encode_special_tokens = False
    inside = without_prefix(tokenizer)
    if inside is tokenizer:
        return [BOS_ID, *_encodings(tokenizer, [text])[0].ids]
    names = {name: number for number, name in special_names(tokenizer).items()}
    pattern = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    first, *others = re.split(f"({pattern})", text)
    ids = [BOS_ID, *_encodings(tokenizer, [first])[0].ids]
    for name, stretch in zip(others[::2], others[1::2], strict=True):
        ids = _without_added_end(tokenizer, ids) if ids[-1] not in names.values() else ids
        ids += [names[name], *_encodings(inside, [stretch])[0].ids]
    return ids


def decode_behind(
    tokenizer: Tokenizer, before: Sequence[int], tokens: Sequence[int], *, skip_special_tokens: bool = True
) -> str:
    """The text that tokens add behind others: with the space in front that decoding removes from a text's start.

    Args:
        tokenizer: any.
        before: ids of the text so far.
        tokens: ids of what follows.
        skip_special_tokens: leave special tokens out.
    """
    start, whole = (
        tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens) for ids in (before, [*before, *tokens])
    )
    if whole.startswith(start):
        return whole[len(start) :]
    return tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens)


def _encodings(tokenizer: Tokenizer, texts: Sequence[str], *, offsets: bool = False) -> list[Encoding]:
    """The library's encodings, without `<s>`; it fails on single texts by some normalizers, which nothing foretells.

    Raises:
        InputError: it does; names the text.
    """
    encode = tokenizer.encode_batch if offsets else tokenizer.encode_batch_fast
    try:
        with library_errors("the tokenizer cannot encode the texts"):
            return encode(list(texts), add_special_tokens=False)
    except InputError:
        for text in texts:
            with library_errors(f"text {text[:_NAMED]!r}: the tokenizer cannot encode it"):
                encode([text], add_special_tokens=False)
        raise


def _without_added_end(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """Ids without a space at the end that is not in the text: decoding does not show it."""
    text = tokenizer.decode(ids)
    added = len(ids) > 1 and text.endswith("\n") and tokenizer.decode(ids[:-1]) == text
    return ids[:-1] if added else ids


def _check_text(text: str) -> None:
    """Refuse command-line bytes that are not UTF-8, which Python represents as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"text {text!a}: is not UTF-8") from None


def _batches(documents: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """Documents of `BATCH_BYTES` together, or a little more, and their size."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += DOCUMENT_OVERHEAD + (len(document) if document.isascii() else len(document.encode()))
        if size >= BATCH_BYTES:
            yield size, batch
            batch, size = [], 0
    if batch:
        yield size, batch


def _to_arrays(encodings: list[Encoding], words: list[int]) -> tuple[np.ndarray, ...]:
    lengths = np.fromiter(map(len, encodings), np.int64, count=len(encodings))
    ids = array("I")
    for encoding in encodings:
        ids.fromlist(encoding.ids)  # the fastest way from a list of integers
    return np.asarray(ids, np.uint32), lengths, np.array(words, np.int64)
