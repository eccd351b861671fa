"""The corpus: documents streamed out of JSONL and text files, gzipped or not, one document in memory at a time.

Tables are read by `gptbert.text.tables`, some rows in memory at a time.
"""

import gzip
import io
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from gptbert.errors import InputError
from gptbert.text.tables import dataset_rows, is_table, require_library, saved_dataset_files, table_rows

MAX_TEXT_DOCUMENT = 1 << 20  # characters, so that a text file without blank lines does not become one document
MAX_LINE = 1 << 26  # bytes, so that a few kilobytes of gzip cannot fill the memory
REPORTED_LINES = 5  # bad lines reported individually with --on_error=skip; the rest is only counted
GZIP_MAGIC = b"\x1f\x8b"
UTF8_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """Where the documents come from."""

    input: tuple[Path, ...] = ()
    """Files or folders of documents.
    Folders are read recursively, sorted by name, without hidden files.
    Gzip is recognized by content, Parquet and Arrow by the suffixes .parquet and .arrow.
    A folder written by save_to_disk of Hugging Face's datasets is read as that dataset."""
    dataset: str | None = None
    """Instead of --input: a Hugging Face dataset, streamed; its name on the Hub or a folder of data files."""
    dataset_config: str | None = None
    """Configuration of --dataset, if it has several."""
    split: str | None = None
    """Split of --dataset, or of a folder written by DatasetDict.save_to_disk, if it has several."""
    text_field: str = "text"
    """Field of a JSON object, or column of a table, with the text."""
    format: Literal["auto", "jsonl", "text"] = "auto"
    """Format of files that are not tables.
    jsonl: one document per line, a JSON string or an object with a --text_field string.
    text: plain UTF-8.
    auto: jsonl for names that end in .jsonl, .ndjson or .json (or these and .gz), else text."""
    text_documents: Literal["blank_line", "line"] = "blank_line"
    """What ends a document in a text file: a blank line, or every line.
    A document that reaches 1,048,576 characters is cut at the end of that line."""
    on_error: Literal["stop", "skip"] = "stop"
    """Stop at a line or row that is not a document (broken JSON, no text, not UTF-8), or skip and count it."""


class Corpus:
    """The documents of a CorpusConfig, in order, stripped of surrounding whitespace; empty ones are omitted.

    Iterating updates the counts and shows a progress bar over the bytes on disk, or the bytes so far of a dataset by
    name.

    Attributes:
        files: every file to read; empty for a dataset by name.
        num_bytes: their size on disk in bytes, compressed if they are.
        num_documents: documents yielded so far.
        text_bytes: their size as UTF-8, in bytes.
        empty_documents: documents omitted because they were only whitespace.
        skipped_lines: bad lines and rows skipped with `on_error="skip"`.
    """

    def __init__(self, config: CorpusConfig, domain_field: str | None = None) -> None:
        """List the files.

        Args:
            config: what to read, and how.
            domain_field: field of JSONL objects, or column of tables, with each document's domain, for `with_domains`.

        Raises:
            InputError: a path does not exist, a folder has no files, or a library needed to read it is missing.
        """
        self.config = config
        self.domain_field = domain_field
        if bool(config.input) == bool(config.dataset):
            raise InputError("--input: needs at least one file or folder, or --dataset a name instead")
        listed = [file for path in config.input for file in _list_files(path, config.split)]
        self.files = list({file.resolve(): file for file in listed}.values())
        if tables := [file for file in self.files if is_table(file)]:
            require_library("pyarrow", str(tables[0]))
        self.num_bytes = sum(file.stat().st_size for file in self.files)
        self.num_documents = self.text_bytes = self.empty_documents = self.skipped_lines = 0

    def __iter__(self) -> Iterator[str]:
        """Yield each document.

        Raises:
            InputError: a file cannot be read or, with `on_error="stop"`, a line or row is bad; names it.
        """
        return (text for _, text in self.with_domains())

    def with_domains(self) -> Iterator[tuple[str, str]]:
        """Yield each document's domain ("" without a `domain_field`), and the document.

        Raises:
            InputError: as in `__iter__`; a line without the field is bad.
        """
        # Smooth on a terminal, an occasional line in the log of a batch job.
        interval = 0.2 if sys.stderr.isatty() else 30.0
        total = None if self.config.dataset else self.num_bytes
        with tqdm(total=total, unit="B", unit_scale=True, delay=0.5, mininterval=interval) as bar:
            for domain, document in self._documents(bar.update):
                text = document.strip()
                if not text:
                    self.empty_documents += 1
                    continue
                self.num_documents += 1
                self.text_bytes += len(text) if text.isascii() else len(text.encode())
                yield domain, text

    def counts(self) -> str:
        """A summary of what was read and omitted, for a script's last line."""
        skipped = f"{self.skipped_lines:,} bad lines skipped, {self.empty_documents:,} empty documents dropped"
        return f"{self.num_documents:,} documents, {self.text_bytes:,} bytes of text ({skipped})"

    def require_documents(self) -> None:
        """Raise InputError if nothing was read."""
        if self.num_documents == 0:
            config = self.config
            name = f"--dataset {config.dataset}" if config.dataset else f"--input {' '.join(map(str, config.input))}"
            raise InputError(f"{name}: holds no text ({self.counts()}), so nothing was written")

    def _documents(self, advance: Callable[[int], object]) -> Iterator[tuple[str, str]]:
        config = self.config
        columns = (config.text_field, *([self.domain_field] if self.domain_field else []))
        if config.dataset:
            rows = dataset_rows(config.dataset, config.dataset_config, config.split, columns, advance)
            yield from self._table_documents(f"--dataset {config.dataset}", rows)
        for file in self.files:
            if is_table(file):
                yield from self._table_documents(str(file), table_rows(file, columns, advance))
            else:
                read = self._jsonl_documents if self._is_jsonl(file) else self._text_documents
                yield from read(file, numbered_lines(file, advance))

    def _table_documents(self, where: str, rows: Iterator[dict[str, Any]]) -> Iterator[tuple[str, str]]:
        for number, row in enumerate(rows, start=1):
            try:
                yield self._parts(row)
            except ValueError as error:
                self._reject(f"{where}: row {number}", error)

    def _is_jsonl(self, file: Path) -> bool:
        if self.config.format != "auto":
            return self.config.format == "jsonl"
        name = file.name.lower().removesuffix(".gz")
        return name.endswith((".jsonl", ".ndjson", ".json"))

    def _jsonl_documents(self, file: Path, lines: Iterator[tuple[int, bytes]]) -> Iterator[tuple[str, str]]:
        for number, line in lines:
            if line.isspace():
                continue
            try:
                yield self._parts(parse_json(line))
            except ValueError as error:
                self._reject(f"{file}:{number}", error)

    def _text_documents(self, file: Path, lines: Iterator[tuple[int, bytes]]) -> Iterator[tuple[str, str]]:
        if self.domain_field:
            raise InputError(
                f"{file}: plain text has no field {self.domain_field!r}; --domain_field takes JSONL and tables"
            )
        every_line = self.config.text_documents == "line"
        pieces, size = [], 0
        for number, line in lines:
            try:
                _check_length(line)
                piece = _decode(line)
            except ValueError as error:
                self._reject(f"{file}:{number}", error)
                continue
            blank = piece.isspace()
            if every_line or not blank:
                pieces.append(piece)
                size += len(piece)
            if pieces and (every_line or blank or size >= MAX_TEXT_DOCUMENT):
                yield "", "".join(pieces)
                pieces, size = [], 0
        if pieces:
            yield "", "".join(pieces)

    def _parts(self, record: Any) -> tuple[str, str]:
        """The domain and the text of a line or row; ValueError with the reason if there is none."""
        if isinstance(record, dict):
            domain = label_field(record, self.domain_field) if self.domain_field else ""
            return domain, string_field(record, self.config.text_field)
        text = _string(record, "the line")
        if self.domain_field:
            raise ValueError(f"the line is a string, not an object with a `{self.domain_field}`")
        return "", text

    def _reject(self, place: str, reason: ValueError) -> None:
        if self.config.on_error == "stop":
            raise InputError(f"{place}: {reason}; correct it, or leave such lines out with --on_error=skip")
        self.skipped_lines += 1
        if self.skipped_lines <= REPORTED_LINES:
            tqdm.write(f"skipped {place}: {reason}", file=sys.stderr)
        elif self.skipped_lines == REPORTED_LINES + 1:
            tqdm.write("skipped more lines, which are only counted", file=sys.stderr)


class _CountedFile(io.FileIO):
    """A file that reports the bytes read from disk, compressed ones for gzip, to show progress."""

    def __init__(self, file: Path, advance: Callable[[int], object]) -> None:
        super().__init__(file)
        self._advance = advance

    def readinto(self, buffer: bytearray | memoryview) -> int:
        count = super().readinto(buffer)
        self._advance(count)
        return count


def _list_files(path: Path, split: str | None) -> list[Path]:
    """The file itself, or all files below a folder."""
    if not path.exists():
        raise InputError(f"--input {path}: no such file or folder")
    if not path.is_dir():
        return [path]

    def fail(error: OSError) -> None:
        raise InputError(f"--input {error.filename}: cannot be listed ({error.strerror})") from error

    files = []
    for folder, subfolders, names in os.walk(path, onerror=fail):
        if (saved := saved_dataset_files(Path(folder), names, split)) is not None:
            files += saved
            subfolders.clear()
            continue
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    files = sorted(file for file in files if file.is_file())
    if not files:
        raise InputError(f"--input {path}: the folder holds no file (hidden ones are left out)")
    return files


def numbered_lines(file: Path, advance: Callable[[int], object]) -> Iterator[tuple[int, bytes]]:
    """Yield a file's lines as bytes with line ends, numbered from 1; decompresses gzip.

    A line longer than `MAX_LINE` is truncated to one byte more than that.
    """
    try:
        with io.BufferedReader(_CountedFile(file, advance), buffer_size=1 << 20) as stream:
            lines = stream
            if stream.peek(2).startswith(GZIP_MAGIC):
                lines = io.BufferedReader(gzip.GzipFile(fileobj=stream), buffer_size=1 << 20)
            for number in count(start=1):
                line = lines.readline(MAX_LINE + 1)
                if not line:
                    break
                yield number, line.removeprefix(UTF8_MARK) if number == 1 else line
                while len(line) > MAX_LINE and not line.endswith(b"\n"):  # skip the rest of an overlong line
                    line = lines.readline(MAX_LINE + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{file}: the gzip data is damaged or cut short ({error}); copy the file again") from error
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror})") from error


def _check_length(line: bytes) -> None:
    if len(line) > MAX_LINE:
        raise ValueError(f"the line has more than {MAX_LINE:,} bytes")


def _decode(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte 0x{line[error.start]:02x} at column {error.start + 1})") from None


def parse_json(line: bytes) -> Any:
    """The JSON value on a line; ValueError with the reason if there is none."""
    _check_length(line)
    try:
        return json.loads(_decode(line.rstrip(b"\r\n")))
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg.removesuffix(' at')} at column {error.colno})") from None
    except RecursionError:
        raise ValueError("not a document (JSON nested too deeply)") from None


def string_field(values: dict[str, Any], name: str) -> str:
    """A text in a JSON object; ValueError with the reason if there is none."""
    if name not in values:
        raise ValueError(f"the object has no `{name}`")
    return _string(values[name], f"`{name}`")


def label_field(values: dict[str, Any], name: str) -> str:
    """A label in a JSON object, possibly a number or a boolean; ValueError with the reason if there is none."""
    value = values.get(name)
    return json.dumps(value) if isinstance(value, bool | int | float) else string_field(values, name)


def _string(value: Any, what: str) -> str:
    if isinstance(value, bytes):  # from a table
        return _decode(value)
    if not isinstance(value, str):
        kind = _JSON_NAMES.get(type(value), f"of type {value}")
        raise ValueError(f"{what} is {kind}, not a string")  # noqa: TRY004  a bad line, not a bug
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half a surrogate pair, \\u{ord(value[error.start]):04x}, is not a character") from None
    return value


_JSON_NAMES = {dict: "an object", list: "an array", int: "a number", float: "a number", bool: "a boolean"}
_JSON_NAMES[type(None)] = "null"
