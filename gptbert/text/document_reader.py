"""Documents out of one file or table after the other, each with its domain; bad lines and rows are counted."""

import io
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from gptbert.errors import InputError, one_line
from gptbert.io.screen import log
from gptbert.text.corpus_config import CorpusConfig
from gptbert.text.corpus_files import Source, as_text
from gptbert.text.documents import MAX_DOCUMENT, cut_place, keys_of, label_field, not_json, not_utf8, parse_json, string
from gptbert.text.file_kind import FileKind
from gptbert.text.json_values import numbered_values
from gptbert.text.lines import LongLine, numbered_blocks, numbered_lines
from gptbert.text.long_json import LongJson
from gptbert.text.long_text import LongText
from gptbert.text.opened_file import OpenedFile, opened
from gptbert.text.tables import table_rows
from gptbert.text.tally import Tally

REPORTED_LINES = 5  # bad lines reported individually with --on_error=skip; the rest is only counted
MOST_OBJECTS = 20  # of JSON, on lines one after the other of plain text
_OBJECTS = re.compile(rb'(?:(?:\A|\n)\{"[^\n]*\}\r?(?=\n|\Z)){2,}')
FEW_LINES = 36  # of a file of which more than half may be bad with --on_error=skip


class DocumentReader:
    """Reads documents as a CorpusConfig says, and counts what it omits.

    Attributes:
        columns: those that are read of tables.
        first_bad: the first bad line or row that was skipped, and why; "" if there was none.
    """

    def __init__(self, config: CorpusConfig, domain_field: str | None, tally: Tally) -> None:
        self.config = config
        self.domain_field = domain_field
        self.tally = tally
        self.columns = (config.text_field, *([domain_field] if domain_field else []))
        self.first_bad = ""
        self._before = 0, 0  # good and bad lines before this file

    def check_all(self) -> None:
        """Raise InputError if, of all files together, most lines were bad."""
        self._before = 0, 0
        self._check_bad("--input")

    def of_rows(self, where: str, rows: Iterator[dict[str, Any]]) -> Iterator[tuple[str, str]]:
        """The documents of a table's rows; `where` names it."""
        self._before = self.tally.good_lines, self.tally.skipped_lines
        before = self.tally.text_bytes
        with LongText() as document:
            for number, row in enumerate(rows, start=1):
                try:
                    if isinstance(content := row[self.config.text_field], memoryview):
                        document.fill(content)
                        row[self.config.text_field] = document
                    domain, text = self._parts(row)
                except ValueError as error:
                    self._reject(f"{where}: row {number}", error, 0)
                else:
                    self.tally.good_lines += 1
                    yield from self._pieces(domain, text)
        self.tally.read_bytes += self.tally.text_bytes - before
        self._check_bad(where)

    def of_file(self, source: Source, advance: Callable[[int], object]) -> Iterator[tuple[str, str]]:
        """The documents of a file; `advance` is called with the number of further bytes read from the disk."""
        file = source.path
        if source.kind and source.kind.is_table:
            yield from self.of_rows(str(file), table_rows(file, source.kind, self.columns, advance))
            return
        self._before = self.tally.good_lines, self.tally.skipped_lines
        with opened(file, advance) as read:
            kind = source.kind or self._kind_of_pipe(read)
            if kind.reader == "jsonl":
                yield from self._jsonl_documents(file, numbered_lines(read, self._count))
            elif kind.reader == "json":
                values = numbered_values(read, self._count, self.config.text_field, self.domain_field)
                yield from self._json_documents(file, values)
            else:
                yield from self._text_documents(file, numbered_blocks(read, self._count))
        self._check_bad(str(file))

    def _kind_of_pipe(self, read: OpenedFile) -> FileKind:
        kind = as_text(read.kind(self.config.text_field), self.config.format)
        if not kind.reader:
            raise InputError(kind.refusal(read.file))
        if kind.is_table:
            raise InputError(f"{read.file}: is {kind.name}, which is not read from a pipe; save it as a file")
        return kind

    def _count(self, size: int) -> None:
        self.tally.read_bytes += size

    def _jsonl_documents(self, file: Path, lines: Iterator[tuple[int, bytes | LongLine]]) -> Iterator[tuple[str, str]]:
        for number, line in lines:
            if isinstance(line, LongLine):
                yield from self._long_line(file, number, line)
                continue
            if not line.strip():
                continue
            try:
                document = self._parts(parse_json(line))
            except ValueError as error:
                _refuse_nul(file, number, line)
                self._reject(f"{file}:{number}", error, len(line))
            else:
                self.tally.good_lines += 1
                yield document

    def _long_line(self, file: Path, number: int, line: LongLine) -> Iterator[tuple[str, str]]:
        with LongText() as document:
            reader = LongJson(iter(line), document, self.config.text_field, self.domain_field)
            value, wrong = None, None
            try:
                try:
                    value = reader.read()
                    reader.end()
                except (ValueError, RecursionError) as error:
                    wrong = not_json(error)
                line.finish()
                if wrong := line.wrong or wrong:
                    raise wrong
                domain, text = self._parts(value)
            except ValueError as error:
                if line.blank:
                    return
                if line.nul:
                    raise InputError(_has_nul(file, number, line.nul)) from None
                self._reject(f"{file}:{number}", error, line.size)
            else:
                self.tally.good_lines += 1
                yield from self._pieces(domain, text)

    def _json_documents(self, file: Path, values: Iterator[tuple[int, Any]]) -> Iterator[tuple[str, str]]:
        for number, value in values:
            try:
                domain, text = self._parts(value)
            except ValueError as error:
                self._reject(f"{file}:{number}", error, 0)
            else:
                self.tally.good_lines += 1
                yield from self._pieces(domain, text)

    def _pieces(self, domain: str, text: str | LongText) -> Iterator[tuple[str, str]]:
        """A document, a long one in the pieces that `Corpus` would cut it into."""
        if isinstance(text, str):
            yield domain, text
            return
        for number, piece in enumerate(text.pieces()):
            self.tally.cut_documents += number == 1
            yield domain, piece

    def _text_documents(self, file: Path, blocks: Iterator[tuple[int, bytes]]) -> Iterator[tuple[str, str]]:
        if self.domain_field:
            raise InputError(
                f"{file}: plain text has no field {self.domain_field!r}; --domain_field takes JSON and tables"
            )
        every_line = self.config.text_documents == "line"
        pieces, size, parts = list[str](), 0, 0  # of a document: what is read, its length, and how often it was cut
        in_line = blank = False  # whether a line goes on that is not blank
        for block in blocks:
            piece = ""
            for piece in self._lines(file, *block):
                blank = not in_line and piece.isspace()
                in_line = False
                ended = (every_line or blank) and piece.endswith("\n")
                if ended and not pieces and not parts:
                    if every_line:
                        yield "", piece
                    continue
                if every_line or not blank:
                    pieces.append(piece)
                    size += len(piece)
                if size > MAX_DOCUMENT:
                    text = "".join(pieces).lstrip()
                    # whitespace at its end is none of the document's, unless more follows
                    while len(text) > 2 * MAX_DOCUMENT or len(text.rstrip()) > MAX_DOCUMENT:
                        end = cut_place(text)
                        self.tally.cut_documents += parts == 1
                        parts += 1
                        yield "", text[:end]
                        text = text[end:].lstrip()
                    pieces, size = [text] * bool(text), len(text)
                if ended:
                    if not parts or not self._is_blank_end(pieces, parts):
                        yield "", "".join(pieces)
                    pieces, size, parts = [], 0, 0
            in_line = piece != "" and not blank and not piece.endswith("\n")
        if pieces and not self._is_blank_end(pieces, parts):
            yield "", "".join(pieces)

    def _is_blank_end(self, pieces: list[str], parts: int) -> bool:
        """Whether nothing is left of a document of which there were parts; otherwise it was cut, if there was one."""
        if parts and not "".join(pieces).strip():
            return True
        self.tally.cut_documents += parts == 1
        return False

    def _lines(self, file: Path, number: int, block: bytes) -> Iterable[str]:
        """The lines of a block, with line ends; bad ones are rejected."""
        if self.config.format == "auto":
            _refuse_json_lines(file, number, block)
        try:
            text = block.decode("utf-8")
        except UnicodeDecodeError:
            return self._good_lines(file, number, block)
        if "\0" in text:
            _refuse_nul(file, number, block)
        if "\ufeff" in text:  # marks of files that were joined
            text = text.removeprefix("\ufeff").replace("\n\ufeff", "\n")
        text = _with_line_feeds(text)
        self.tally.good_lines += text.count("\n") + (not text.endswith("\n"))
        return io.StringIO(text, newline="\n")

    def _good_lines(self, file: Path, number: int, block: bytes) -> Iterator[str]:
        """As `_lines`, line by line."""
        for place, line in enumerate(io.BytesIO(block), start=number):
            _refuse_nul(file, place, line)
            try:
                piece = line.decode("utf-8")
            except UnicodeDecodeError as error:
                self._reject(f"{file}:{place}", not_utf8(error), len(line))
            else:
                self.tally.good_lines += 1
                yield _with_line_feeds(piece)

    def _parts(self, record: Any) -> tuple[str, Any]:
        """The domain and the text of a line or row; ValueError with the reason if there is none."""
        if isinstance(record, dict):
            name = self.config.text_field
            if name not in record:
                raise ValueError(f"the object has no `{name}`, only {keys_of(record)} (--text_field names another)")
            is_long = isinstance(record.get(self.domain_field), LongText | memoryview)
            domain = label_field(record, self.domain_field) if self.domain_field and not is_long else ""
            if is_long or len(domain) > MAX_DOCUMENT:
                raise ValueError(f"`{self.domain_field}` is too long for a domain")
            return domain, _checked(record[name], f"`{name}`")
        text = _checked(record, "the line")
        if self.domain_field:
            raise ValueError(f"the line is a string, not an object with a `{self.domain_field}`")
        return "", text

    def _reject(self, place: str, reason: ValueError, size: int) -> None:
        """Stop at a bad line or row, or count it. Only in a file of the right kind is a bad line worth skipping."""
        if self.config.on_error == "stop":
            good = self.tally.good_lines > self._before[0]
            way_on = "correct it"
            if str(reason).startswith("not UTF-8") and ": row" not in place:
                way_on = "correct it, or convert the file if it is in another encoding (iconv -f ENCODING -t UTF-8)"
            elif not good and str(reason).startswith("not JSON"):
                way_on = "correct it, or --format text if it is plain text"
            elif not good and self._is_of_domain(str(reason)):
                way_on = "give another field as --domain_field, or leave it out"
            skip = ", or leave such lines out with --on_error=skip" if good else ""
            raise InputError(f"{place}: {reason}; {way_on}{skip}")
        self.first_bad = self.first_bad or f"{place}: {reason}"
        self.tally.skipped_bytes += size
        self.tally.skipped_lines += 1
        if self.tally.skipped_lines <= REPORTED_LINES:
            log(one_line(f"skipped {place}: {reason}"))
        elif self.tally.skipped_lines == REPORTED_LINES + 1:
            log("skipped more lines, which are only counted")

    def _is_of_domain(self, reason: str) -> bool:
        """Whether a line or row is bad for want of a domain alone."""
        name = f"`{self.domain_field}`"
        return bool(self.domain_field) and reason.startswith(
            (f"the object has no {name}", f"{name} is", "the line is a string, not an object with")
        )

    def _check_bad(self, where: str) -> None:
        """A file whose lines are bad for the most part is of another kind than it is read as."""
        good, bad = self.tally.good_lines - self._before[0], self.tally.skipped_lines - self._before[1]
        if bad > good and good + bad > FEW_LINES:
            raise InputError(
                f"{where}: {bad:,} of {good + bad:,} lines are bad ({bad / (good + bad):.0%}), too many to be skipped; "
                f"the first: {self.first_bad}"
            )


def _with_line_feeds(text: str) -> str:
    """Text whose lines end as those of all files do: how they end in this one is none of the text."""
    return text.replace("\r\n", "\n") if "\r" in text else text


def _checked(value: Any, what: str) -> str | LongText:
    return value.checked(what) if isinstance(value, LongText) else string(value, what)


def _refuse_json_lines(file: Path, number: int, block: bytes) -> None:
    """Raise InputError if a block of plain text, whose first line has this number, has JSON Lines in it."""
    if block.count(b'\n{"') + block.startswith(b'{"') < 2:
        return
    for found in _OBJECTS.finditer(block):
        start, end = found.span()
        if block.count(b"\n{", start, end) < MOST_OBJECTS and end - start < len(block) / 2:
            continue
        line = number + block.count(b"\n", 0, start) + block.startswith(b"\n", start)
        raise InputError(
            f"{file}:{line}: JSON Lines begin here, after plain text; split the file in two, or --format text if all "
            "of it is plain text"
        )


def _refuse_nul(file: Path, number: int, lines: bytes) -> None:
    """Raise InputError if lines, of which the first has this number, have NULs."""
    if (place := lines.find(0)) >= 0:
        line, column = number + lines.count(b"\n", 0, place), place - lines.rfind(b"\n", 0, place)
        raise InputError(_has_nul(file, line, column))


def _has_nul(file: Path, line: int, column: int) -> str:
    return f"{file}:{line}: has NUL bytes from column {column} on, so it is damaged or not text; copy it again"
