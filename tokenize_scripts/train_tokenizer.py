"""Train a byte-level BPE tokenizer: `train_tokenizer.py --input corpus --output tokenizer.json --vocab_size=16384`."""

import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tqdm import tqdm

from gptbert.command_line import run_command
from gptbert.errors import InputError
from gptbert.io.outputs import check_outputs, staged_outputs
from gptbert.text.corpus import Corpus, CorpusConfig
from gptbert.text.encoding import encode_documents
from gptbert.text.special_tokens import SPECIAL_TOKENS, UNK_ID
from gptbert.text.splitting import NormalForm, Splitting, own_splitting, upstream_splitting
from gptbert.text.tally import TokenFigures, close
from gptbert.text.tokenizer import bos_template

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())  # 256 characters, one per byte
LONG_WORD = re.compile(r"\S{1000}")  # what the library learns of a word takes the square of its length: it gets an end
LONG_TEXT = 1 << 16  # characters; of longer texts the library gets pieces
SAMPLED_CHARACTERS = 1_000_000  # of the corpus, encoded at the end to show what the tokenizer does with it
MOST_DECOMPOSED = 0.01  # share of the documents that may be without a warning
MOST_PAIRS = 2_000_000_000  # the library counts a pair in 32 bits: from 2^31 on it is never merged, without a word
_COUNTED = 1 << 20  # bytes at a time
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + len(ALPHABET)


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerConfig(CorpusConfig):
    """Train a byte-level BPE tokenizer: any text can be encoded, and decoding restores it, in its normal form."""

    output: Path
    """The tokenizer, a JSON file of the `tokenizers` library."""
    vocab_size: int = 16384
    """Tokens in the vocabulary, including the 16 special ones and the 256 bytes; a small corpus may give fewer."""
    min_frequency: int = 2
    """How often a pair must occur in the corpus to become a token."""
    prefix_space: bool = False
    """Put a space in front of each text, so that its first word has the token that the word has inside of a text."""
    normalizer: Annotated[
        NormalForm | None,  # None, if it is not given: unlike nfc, it goes with --like
        tyro.conf.arg(constructor=NormalForm, help_behavior_hint="(default: nfc; with --like upstream nfkc)"),
    ] = None
    """The Unicode normal form of all text. nfc: letters and their accents composed, the same text to a reader. nfkc:
    also without variants such as ligatures and wide letters. none: as it is, so that decoding restores every byte."""
    marks_in_words: bool = True
    """A combining mark belongs to the word whose letter it is on. If not, it ends the word, as in GPT-2."""
    like: Literal["upstream"] | None = None
    """upstream: normalizer and splitter of the published GPT-BERT tokenizers, with a space in front and NFKC."""

    def __post_init__(self) -> None:
        if self.like and self.normalizer not in {None, "nfkc"}:
            raise InputError(f"--normalizer {self.normalizer}: --like {self.like} is nfkc; use one of the two flags")
        if self.like and not self.marks_in_words:
            raise InputError(f"--no_marks_in_words: --like {self.like} has marks in words; use one of the two flags")

    @property
    def normal_form(self) -> NormalForm:
        """The normal form that text gets."""
        return self.normalizer or ("nfkc" if self.like else "nfc")

    @property
    def splitting(self) -> Splitting:
        """The tokenizer's parts around its vocabulary."""
        if self.like:
            return upstream_splitting()
        return own_splitting(
            prefix_space=self.prefix_space, normalizer=self.normal_form, marks_in_words=self.marks_in_words
        )


@dataclass
class Forms:
    """Counts of documents with other than ASCII characters.

    Attributes:
        number: all of them.
        decomposed: those that are not in NFC, mostly because letters and their accents are characters of their own.
    """

    number: int = 0
    decomposed: int = 0

    def counted(self, texts: Iterable[str]) -> Iterator[str]:
        """The documents, which are counted as they pass."""
        for text in texts:
            if not text.isascii():
                self.number += 1
                self.decomposed += not unicodedata.is_normalized("NFC", text)
            yield text

    def __str__(self) -> str:
        return (
            f"{self.decomposed:,} of {self.number:,} documents with other than ASCII characters are decomposed, at "
            "least in part (a letter and its accent are two characters)"
        )


def countable(texts: Iterable[str]) -> Iterator[str]:
    """The texts, as long as the library can count their pairs: none is of more than the most frequent pair of bytes.

    Raises:
        InputError: there are too many; some 90 GB of English, or 12 GB of code, whose spaces are pairs.
    """
    counts, waiting, size = np.zeros(2**16, np.int64), list[bytes](), 0
    for text in texts:
        waiting.append(text.encode())
        size += len(waiting[-1])
        if size >= _COUNTED:
            content = np.frombuffer(b"\n".join(waiting), np.uint8).astype(np.uint16)
            counts += np.bincount(content[:-1] << 8 | content[1:], minlength=len(counts))
            if counts.max() > MOST_PAIRS:
                pair = int(counts.argmax()).to_bytes(2)
                raise InputError(
                    f"the corpus is too large to learn a tokenizer from: the bytes {pair!r} occur {counts.max():,} "
                    "times, and the library counts pairs in 32 bits; give a part of it in --input, with all kinds of "
                    "its texts: some gigabytes are enough"
                )
            waiting, size = [], 0
        yield text


def train_tokenizer(config: TrainTokenizerConfig) -> None:
    """Count the words of the corpus, learn the merges, write the tokenizer.

    Memory grows with the number of distinct words, not with the size of the corpus.

    Raises:
        InputError: a flag, the input or the output cannot be used.
    """
    if config.vocab_size < SMALLEST_VOCABULARY:
        raise InputError(
            f"--vocab_size={config.vocab_size}: must be at least {SMALLEST_VOCABULARY} "
            f"({len(SPECIAL_TOKENS)} special tokens and {len(ALPHABET)} bytes)"
        )
    if config.min_frequency < 1:
        raise InputError(f"--min_frequency={config.min_frequency}: must be at least 1")
    corpus = Corpus(config)
    check_outputs([config.output], corpus.files)
    sample: list[str] = []
    forms = Forms()
    with staged_outputs(config.output) as (staged,):
        texts = countable(forms.counted(_announce_merges(corpus, sample)))
        tokenizer = learn(texts, config.vocab_size, config.min_frequency, config.splitting)
        corpus.require_documents()
        staged.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    size = tokenizer.get_vocab_size()
    if size < config.vocab_size:
        print(
            f"note: the vocabulary has {size} tokens, not {config.vocab_size}: the corpus is too small, it has no more "
            f"pairs that occur {config.min_frequency} times; training works with it as it is, or use more text"
        )
    if config.like:
        print(
            f"normalizer and splitter are {config.like}'s: a space in front of each text, {config.normal_form.upper()}"
        )
    if forms.decomposed and config.normal_form != "none":
        print(f"note: {forms}; the tokenizer composes them ({config.normal_form.upper()}), and decoding leaves it so")
    token_figures = TokenFigures(*_encoded(tokenizer, sample), size)
    close(
        f"wrote {config.output}: {size} tokens, learned from {corpus.tally.counts()}",
        [f"{token_figures.bytes_per_token:.2f} bytes per token at its start", corpus.tally.figures()],
        corpus.warnings() + token_figures.warnings() + _warnings(forms, config),
    )


def learn(texts: Iterator[str], vocab_size: int, min_frequency: int, splitting: Splitting | None = None) -> Tokenizer:
    """Learn a tokenizer whose special tokens have the ids 0 … 15 and whose encodings start with `<s>`.

    Args:
        texts: documents.
        vocab_size: maximum number of tokens; fewer if no remaining pair is frequent enough.
        min_frequency: occurrences that a pair needs to become a token.
        splitting: of texts into words; None is the command's default. None puts letters and `>` into one word, so no
            sequence of merges can spell a special token.
    """
    splitting = splitting or own_splitting()
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL_TOKENS[UNK_ID], ignore_merges=splitting.takes_whole_words))
    if splitting.normalizer:
        tokenizer.normalizer = splitting.normalizer
    tokenizer.pre_tokenizer = splitting.pre_tokenizer
    tokenizer.decoder = splitting.decoder
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=ALPHABET,
        show_progress=False,  # the corpus has its own
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = bos_template()
    return tokenizer


def in_pieces(text: str) -> Iterator[str]:
    """A text as the library gets it, which takes 256 at a time and much memory for each: cut in front of a space."""
    start = 0
    while len(text) - start > LONG_TEXT:
        end = text.rfind(" ", start + 1, start + LONG_TEXT)
        end = end if end > start else start + LONG_TEXT
        yield text[start:end]
        start = end
    yield text[start:]


def _announce_merges(corpus: Corpus, sample: list[str]) -> Iterator[str]:
    """The documents, the first of them kept in `sample`; then print a line: the library learns without progress."""
    size = 0
    for text in corpus:
        if size < SAMPLED_CHARACTERS:
            sample.append(text)
            size += len(text)
        yield from in_pieces(LONG_WORD.sub(lambda word: f"{word[0]}\n", text))
    tqdm.write(f"read {corpus.tally.num_documents:,} documents; learning the merges", file=sys.stderr)


def _warnings(forms: Forms, config: TrainTokenizerConfig) -> list[str]:
    """What is past a sensible limit in the form of the text."""
    if config.normal_form != "none" or forms.decomposed <= MOST_DECOMPOSED * forms.number:
        return []
    return [f"{forms}: the same word in another form has other tokens; --normalizer nfc makes them one"]


def _encoded(tokenizer: Tokenizer, texts: list[str]) -> tuple[int, int, int]:
    """The numbers of tokens and of unknown ones, and of bytes, of some texts."""
    tokens = unknown = 0
    for ids, *_ in encode_documents(tokenizer, texts):
        tokens += len(ids)
        unknown += int((ids == UNK_ID).sum())
    return tokens, unknown, sum(len(text.encode()) for text in texts)


def main() -> None:
    """Entry point."""
    run_command(TrainTokenizerConfig, train_tokenizer)


if __name__ == "__main__":
    main()
