"""Lines of a text file, numbered, as UTF-8 bytes; long ones in pieces."""

import codecs
import io
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

from gptbert.errors import InputError
from gptbert.text.documents import not_utf8
from gptbert.text.opened_file import OpenedFile, opened

MAX_LINE = 1 << 20  # bytes of a line, and characters of a JSON value, that are in memory whole
PIECE = 1 << 18  # bytes at a time of plain text, of a long line, and at least of JSON over several lines

Count = Callable[[int], object]


class LongLine:
    """A line of more than `MAX_LINE` bytes, which can be read once.

    Attributes:
        size: bytes read so far.
        blank: whether they are all whitespace.
        nul: the column of the first NUL byte among them, 0 for none.
        wrong: why they are not UTF-8; None if they are.
    """

    def __init__(self, beginning: bytes, stream: io.BufferedReader) -> None:
        self.size, self.blank, self.nul = 0, True, 0
        self.wrong: ValueError | None = None
        self._pieces = self._read(beginning, stream)

    def __iter__(self) -> Iterator[str]:
        """Yield the text, as far as it is UTF-8, without the end of the line; what is left of it, the second time."""
        return self._pieces

    def finish(self) -> None:
        """Read the rest."""
        for _ in self._pieces:
            pass

    def _read(self, beginning: bytes, stream: io.BufferedReader) -> Iterator[str]:
        utf8 = codecs.getincrementaldecoder("utf-8")()
        head = io.BytesIO(beginning)
        ended = False
        while not ended and (piece := head.read(PIECE) or stream.readline(PIECE)):
            if piece.endswith(b"\r"):  # perhaps of the line's end
                piece += head.read(PIECE) or stream.readline(PIECE)
            ended = piece.endswith(b"\n")
            self.blank = self.blank and piece.isspace()
            self.nul = self.nul or (self.size + place + 1 if (place := piece.find(0)) >= 0 else 0)
            text = self._decoded(utf8, piece.rstrip(b"\r\n") if ended else piece, final=ended)
            self.size += len(piece)
            if text:
                yield text
        self._decoded(utf8, b"", final=True)

    def _decoded(self, utf8: codecs.IncrementalDecoder, piece: bytes, *, final: bool) -> str:
        if self.wrong is None:
            waiting = len(utf8.getstate()[0])
            try:
                return utf8.decode(piece, final)
            except UnicodeDecodeError as error:
                self.wrong = not_utf8(error, self.size - waiting)
        return ""


def file_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file by itself, as `numbered_lines`.

    Raises:
        InputError: the file cannot be read, is not text, or has a line of more than `MAX_LINE` bytes.
    """
    with opened(file) as read:
        kind = read.kind()
        if not kind.reader and not kind.is_text:
            raise InputError(kind.refusal(file))
        for number, line in numbered_lines(read):
            if isinstance(line, LongLine):
                raise InputError(f"{file}:{number}: the line has more than {MAX_LINE:,} bytes, the most here")
            yield number, line


def numbered_lines(source: OpenedFile, count: Count = lambda _: None) -> Iterator[tuple[int, bytes | LongLine]]:
    """Yield a file's lines as bytes of UTF-8 with line ends, numbered from 1; long ones, to be read piece by piece.

    Args:
        source: the file.
        count: called with the number of further bytes of text.
    """
    stream = source.utf8(count)
    for number in itertools.count(start=1):
        read = stream.readline(max(MAX_LINE + 1, len(codecs.BOM_UTF8)))
        if not read:
            break
        line = read.removeprefix(codecs.BOM_UTF8)  # the mark of a file that was joined to others
        if len(read) <= MAX_LINE:
            yield number, line
        else:
            long_line = LongLine(line, stream)
            yield number, long_line
            long_line.finish()


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
    """A piece of UTF-8 without an incomplete character or line end at its end, and that."""
    if piece.endswith(b"\r"):
        return piece[:-1], piece[-1:]
    for size in range(1, min(4, len(piece) + 1)):
        if piece[-size] >= 0xC0:  # the first byte of a character of two to four
            needed = 2 if piece[-size] < 0xE0 else 3 if piece[-size] < 0xF0 else 4
            return (piece[:-size], piece[-size:]) if needed > size and len(piece) > size else (piece, b"")
    return piece, b""
