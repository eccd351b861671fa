"""What reading a corpus came to: counts, shares, texts that repeat; and what of it is worth a warning."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

from gptbert.errors import InputError, listed, one_line
from gptbert.text.documents import MAX_DOCUMENT, is_notation, read_wrongly

SAMPLED_TEXTS = 1 << 13  # different texts that are remembered, as hashes
MOST_SKIPPED = 0.01  # share of the text that bad lines may be without a warning
MOST_REPEATED = 0.5
MOST_WRONG = 0.5  # share of the documents that may be notation of a program, or in a wrong encoding
MOST_EMPTY = 0.9  # blank lines among them, with --text_documents line
SOME_UNKNOWN = 0.01  # share of tokens that may be unknown without a warning
MOST_UNKNOWN = 0.5  # and without an error
SHORT_TOKENS, LONG_TOKENS = 1.5, 12.0  # bytes per token, between which there is no warning
LARGE_VOCABULARY = 1000  # for vocabularies from here on; smaller ones have little more than the bytes
SHOWN = 40  # characters of an example
LEAST_TEXT = 0.1  # share of the bytes of files that is expected to be text and not fields around it


class RepeatedTexts:
    """The share of documents whose text came before: exact for few different texts, else estimated.

    Different texts are counted by a sample of their hashes, which halves when it is full: of those that are left, each
    stands for `mask + 1` texts, to within some two per cent.

    Attributes:
        mask: texts whose hash has one of these bits are not in the sample.
    """

    def __init__(self) -> None:
        self._hashes: set[int] = set()
        self.mask = 0

    def add(self, key: int) -> None:
        """Remember a document's hash, which has none of the bits of `mask`."""
        self._hashes.add(key)
        if len(self._hashes) > SAMPLED_TEXTS:
            self.mask = 2 * self.mask + 1
            self._hashes = {key for key in self._hashes if not key & self.mask}

    def share(self, num_documents: int) -> float:
        """Repeated documents as a share of all."""
        different = len(self._hashes) * (self.mask + 1)
        return max(0.0, 1 - different / num_documents) if num_documents else 0.0

    @property
    def exact(self) -> bool:
        """Whether every document was counted."""
        return self.mask == 0


@dataclass
class Tally:
    """Counts of a corpus so far.

    Attributes:
        num_documents: documents yielded, long ones as several.
        text_bytes: their size as UTF-8, in bytes.
        empty_documents: documents omitted because they were only whitespace.
        good_lines: lines of text, and JSON values and rows with a document, empty ones too.
        skipped_lines: bad lines and rows skipped with `--on_error=skip`.
        skipped_bytes: the size of those lines.
        cut_documents: documents that were cut because of their length.
        notations: documents that are what a program writes of texts, such as b'…'.
        not_ascii: documents with other characters than those of ASCII.
        wrongly: those of them whose UTF-8 was read in another encoding.
        example: the last one of them, and what it should be.
        read_bytes: text in the files, with all fields of JSON and without those of tables.
        left_out_bytes: the size on disk of a folder's files that are not read.
        changed_files: files that others wrote to while they were read.
        repeated: how many documents repeat others.
    """

    num_documents: int = 0
    text_bytes: int = 0
    empty_documents: int = 0
    good_lines: int = 0
    skipped_lines: int = 0
    skipped_bytes: int = 0
    cut_documents: int = 0
    notations: int = 0
    not_ascii: int = 0
    wrongly: int = 0
    example: tuple[str, str] = "", ""
    read_bytes: int = 0
    left_out_bytes: int = 0
    changed_files: list[str] = field(default_factory=list)
    repeated: RepeatedTexts = field(default_factory=RepeatedTexts)

    def add(self, document: str) -> None:
        """Count a document."""
        text = document.encode()
        self.num_documents += 1
        self.text_bytes += len(text)
        self.notations += is_notation(document)
        if len(text) > len(document):
            self.not_ascii += 1
            if meant := read_wrongly(document):
                self.wrongly += 1
                self.example = document, meant
        key = _hash(text)
        if not key & self.repeated.mask:
            self.repeated.add(key)

    @property
    def skipped_share(self) -> float:
        """What was skipped, as a share of the text or of the lines, whichever is larger."""
        of_bytes = self.skipped_bytes / max(1, self.skipped_bytes + self.text_bytes)
        return max(of_bytes, self.skipped_lines / max(1, self.skipped_lines + self.good_lines))

    @property
    def repeated_share(self) -> float:
        """Documents whose text came before, as a share of all."""
        return self.repeated.share(self.num_documents)

    @property
    def text_share(self) -> float:
        """The text of documents as a share of the bytes read."""
        return min(1.0, self.text_bytes / self.read_bytes) if self.read_bytes else 1.0

    def counts(self) -> str:
        """Documents, and what was omitted."""
        skipped = f"{self.skipped_lines:,} bad lines skipped, {self.empty_documents:,} empty documents dropped"
        return f"{self.num_documents:,} documents, {self.text_bytes:,} bytes of text ({skipped})"

    def figures(self) -> str:
        """What would show a mistake."""
        about = "" if self.repeated.exact else "about "
        left_out = f"{self.left_out_bytes:,} bytes of files were left out, " if self.left_out_bytes else ""
        return (
            f"{left_out}{self.text_share:.1%} of the bytes read are text, {self.skipped_share:.2%} were skipped, "
            f"{_documents(self.cut_documents)} cut, {about}{self.repeated_share:.1%} repeat others"
        )

    def warnings(self) -> list[str]:
        """What is past a sensible limit."""
        found = []
        if self.changed_files:
            found.append(
                f"changed while they were read, so documents may be cut or missing: {listed(self.changed_files, 5)}"
            )
        if self.empty_documents > MOST_EMPTY * (self.empty_documents + self.num_documents):
            found.append(f"{self.empty_documents:,} documents were empty, and {self.num_documents:,} were not")
        if self.skipped_share > MOST_SKIPPED:
            found.append(f"{self.skipped_share:.1%} of the text was left out as bad lines; look at those named above")
        if self.text_share < LEAST_TEXT:
            found.append(
                f"only {self.text_share:.1%} of the bytes read became text; the rest is whitespace, or other fields "
                "than --text_field"
            )
        if self.repeated_share > MOST_REPEATED:
            found.append(f"{self.repeated_share:.0%} of the documents repeat others")
        if self.notations > MOST_WRONG * self.num_documents:
            found.append(
                f"{self.notations / self.num_documents:.0%} of the documents look like Python's bytes or lists, "
                "as b'…' does, or like JSON in a string; take the texts out of them"
            )
        if self.wrongly > max(MOST_WRONG * self.not_ascii, MOST_SKIPPED * self.num_documents):
            document, meant = (text[:SHOWN] for text in self.example)
            found.append(
                f"{self.wrongly / self.not_ascii:.0%} of the documents that are not ASCII are UTF-8 which was read in "
                f"another encoding, as {document!r} for {meant!r}; convert them back (iconv -f UTF-8 -t WINDOWS-1252, "
                "or LATIN1)"
            )
        if self.cut_documents:
            found.append(f"{_documents(self.cut_documents)} of more than {MAX_DOCUMENT:,} characters cut into several")
        return found


@dataclass(frozen=True)
class TokenFigures:
    """What encoding came to.

    Attributes:
        num_tokens: tokens of the texts.
        unknown: how many of them are the unknown token.
        text_bytes: the size of the texts as UTF-8.
        vocab_size: of the tokenizer.
        lost_share: of the characters, those that no token but the unknown one has.
    """

    num_tokens: int
    unknown: int
    text_bytes: int
    vocab_size: int
    lost_share: float = 0.0

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text per token."""
        return self.text_bytes / max(1, self.num_tokens)

    @property
    def unknown_share(self) -> float:
        """Unknown tokens as a share of all."""
        return self.unknown / max(1, self.num_tokens)

    def check(self, tokenizer: Path) -> None:
        """Raise InputError if most tokens are unknown, or most of the text has none."""
        for share, what in ((self.unknown_share, "tokens are unknown"), (self.lost_share, "text has no known token")):
            if share > MOST_UNKNOWN:
                raise InputError(
                    f"tokenizer {tokenizer}: {share:.0%} of the {what}; nothing was written; train one on these texts "
                    "with tokenize_scripts/train_tokenizer.py"
                )

    def warnings(self) -> list[str]:
        """What is past a sensible limit."""
        found = []
        if self.unknown_share > SOME_UNKNOWN:
            found.append(
                f"{self.unknown_share:.1%} of the tokens are unknown: the tokenizer lacks characters of the text"
            )
        if self.lost_share > max(SOME_UNKNOWN, self.unknown_share):
            found.append(
                f"{self.lost_share:.1%} of the text has no known token: the tokenizer leaves it out, or has one "
                "unknown token for a long stretch"
            )
        fits = SHORT_TOKENS <= self.bytes_per_token <= LONG_TOKENS or not self.num_tokens
        if not fits and self.vocab_size >= LARGE_VOCABULARY:
            found.append(
                f"{self.bytes_per_token:.2f} bytes per token, with a vocabulary of {self.vocab_size:,}: the tokenizer "
                "is for other texts, or drops parts of them"
            )
        return found


def close(line: str, figures: Sequence[str], warnings: Sequence[str]) -> None:
    """Print the last line of a command, with figures at its end, after its warnings."""
    for warning in warnings:
        print(one_line(f"warning: {warning}"), file=sys.stderr, flush=True)
    print("; ".join([line, *figures]))


def _hash(text: bytes) -> int:
    """The same in every run, unlike `hash`; of 32 bits, a tenth of 10^9 documents would have that of another."""
    return int.from_bytes(blake2b(text, digest_size=8).digest())


def _documents(number: int) -> str:
    return f"{number:,} document{'s' * (number != 1)}"
