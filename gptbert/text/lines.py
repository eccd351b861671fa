"""Lines of a text file as UTF-8 bytes, numbered; and JSON values of a file that has them over several lines."""

import codecs
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gptbert.errors import InputError
from gptbert.text.opened_file import OpenedFile, opened

MAX_LINE = 1 << 26  # bytes of a line that must be in memory whole, so that a few kilobytes of gzip cannot fill it
PIECE = 1 << 18  # bytes of plain text, and at least of JSON over several lines, at a time
_SPACE = re.compile(r"[ \t\r\n]*")

Count = Callable[[int], object]


def file_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file by itself, as `numbered_lines`.

    Raises:
        InputError: the file cannot be read, or is not text.
    """
    with opened(file) as read:
        kind = read.kind()
        if not kind.reader and not kind.is_text:
            raise InputError(kind.refusal(file))
        yield from numbered_lines(read)


def numbered_lines(read: OpenedFile, count: Count = lambda _: None) -> Iterator[tuple[int, bytes]]:
    """Yield a file's lines as bytes of UTF-8 with line ends, numbered from 1.

    A line longer than `MAX_LINE` is truncated to one byte more than that.

    Args:
        read: the file.
        count: called with the number of further bytes of text.
    """
    stream = read.utf8(count)
    for number in itertools.count(start=1):
        line = stream.readline(MAX_LINE + 1)
        if not line:
            break
        yield number, line
        while len(line) > MAX_LINE and not line.endswith(b"\n"):  # skip the rest of an overlong line
            line = stream.readline(MAX_LINE + 1)


def numbered_blocks(read: OpenedFile, count: Count = lambda _: None) -> Iterator[tuple[int, bytes]]:
    """Yield a file's text in blocks of some `PIECE` bytes, with the number of the line that each begins on.

    A block ends after the end of a line or, in a line longer than `PIECE`, between two characters.
    """
    stream = read.utf8(count)
    number, rest = 1, b""
    while data := stream.read(PIECE):
        data = rest + data
        end = data.rfind(b"\n") + 1
        block, rest = (data[:end], data[end:]) if end or len(data) < PIECE else _at_character(data)
        if block:
            yield number, block
            number += block.count(b"\n")
    if rest:
        yield number, rest


def _at_character(piece: bytes) -> tuple[bytes, bytes]:
    """A piece of UTF-8 without an incomplete character at its end, and that."""
    for size in range(1, min(4, len(piece) + 1)):
        if piece[-size] >= 0xC0:  # the first byte of a character of two to four
            needed = 2 if piece[-size] < 0xE0 else 3 if piece[-size] < 0xF0 else 4
            return (piece[:-size], piece[-size:]) if needed > size and len(piece) > size else (piece, b"")
    return piece, b""


def numbered_values(read: OpenedFile, count: Count = lambda _: None) -> Iterator[tuple[int, Any]]:
    """Yield the elements of a file that is one JSON array, or JSON values one after the other, over any lines.

    Yields:
        The number of the line that a value begins on, and the value, one in memory at a time.

    Raises:
        InputError: the file is not JSON, or a value has more than `MAX_LINE` characters.
    """
    values = _Values(read, count)
    array = values.next_is("[")
    first = True
    while values.skip_space():
        if array and values.next_is("]"):
            if values.skip_space():
                raise values.error("more follows after the end of the array")
            return
        if array and not first and not (values.next_is(",") and values.skip_space()):
            raise values.error("a comma is missing")
        first = False
        yield values.value()
    if array:
        raise values.error("the array has no end: cut short")


class _Values:
    """A place in a stream of JSON, with some of the text that follows."""

    def __init__(self, read: OpenedFile, count: Count) -> None:
        self._file = read.file
        self._stream = read.utf8(count)
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._json = json.JSONDecoder()
        self._text, self._at, self._line, self._more = "", 0, 1, True

    def error(self, reason: str) -> InputError:
        """What is wrong at this place."""
        return InputError(
            f"{self._file}:{self._line}: not JSON ({reason}); correct it, or --format jsonl if each line is JSON, or "
            "--format text if it is plain text"
        )

    def skip_space(self) -> bool:
        """Go to what is not whitespace; False at the end."""
        while True:
            space: Any = _SPACE.match(self._text, self._at)  # which matches everywhere
            end = space.end()
            self._line += self._text.count("\n", self._at, end)
            self._at = end
            if end < len(self._text):
                return True
            if not self._fill():
                return False

    def next_is(self, character: str) -> bool:
        """Go past a character, if it comes next."""
        found = self.skip_space() and self._text[self._at] == character
        self._at += found
        return found

    def value(self) -> tuple[int, Any]:
        """The value that comes next, and its line."""
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                value, end, reason = None, len(self._text), error.msg.removesuffix(" at")
            except (ValueError, RecursionError) as error:
                reason = "nested too deeply" if isinstance(error, RecursionError) else "a number of too many digits"
                raise self.error(reason) from None
            else:
                reason = ""
            if end < len(self._text) and not reason:
                break
            if len(self._text) - self._at > MAX_LINE:
                raise self.error(reason or f"a value has more than {MAX_LINE:,} characters")
            if not self._fill():  # a number may go on
                if reason:
                    raise self.error(reason)
                break
        line = self._line
        self._line += self._text.count("\n", self._at, end)
        self._at = end
        return line, value

    def _fill(self) -> bool:
        """Read as much again as there is, so that a long value is not parsed in many beginnings."""
        if not self._more:
            return False
        self._text = self._text[self._at :]
        self._at = 0
        data = self._stream.read(max(PIECE, min(len(self._text), MAX_LINE)))
        self._more = bool(data)
        try:
            self._text += self._utf8.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise InputError(
                f"{self._file}: not UTF-8 (byte 0x{error.object[error.start]:02x}, after line {self._line}); convert it"
            ) from None
        return self._more
