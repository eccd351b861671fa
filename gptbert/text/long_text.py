"""A document that is too long for memory: on the disk while it is read, then cut into pieces."""

import codecs
import io
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from gptbert.errors import InputError
from gptbert.text import documents

BLOCK = 1 << 18  # characters that are read again at a time, or bytes of a text that is in memory


class LongText:
    """A text that comes in pieces and goes out, cut as `documents.cut` would cut it whole.

    A temporary file has it if it is more than a megabyte: what is wrong with a line may show only at its end, and then
    none of it is a document. As a context manager it removes the file.
    """

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=documents.MAX_DOCUMENT)  # noqa: SIM115  see __exit__
        self.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def clear(self) -> None:
        """Begin a new text."""
        with _disk():
            self._file.seek(0)
            self._file.truncate()
        self._size = self._end = 0  # bytes, and those up to the last character that is no whitespace
        self._wrong: ValueError | None = None
        self._has_nul = False

    def add(self, piece: str) -> None:
        """Add text at the end."""
        text = piece if self._size else piece.lstrip()
        try:
            content = text.encode()
        except UnicodeEncodeError as error:
            self._wrong = self._wrong or documents.half_a_pair(error)
            return
        self._has_nul |= "\0" in text
        with _disk():
            self._file.write(content)
        if kept := text.rstrip():
            self._end = self._size + len(content) - len(text[len(kept) :].encode())
        self._size += len(content)

    def fill(self, content: memoryview) -> None:
        """Begin a new text that is all of these bytes; ValueError with the reason if they are not UTF-8."""
        self.clear()
        start = 0
        while start < len(content):
            block = content[start : start + BLOCK]
            try:
                text, size = codecs.utf_8_decode(block, "strict", start + len(block) == len(content))
            except UnicodeDecodeError as error:
                raise documents.not_utf8(error, start) from None
            self.add(text)
            start += size

    def checked(self, what: str) -> "LongText":
        """This; ValueError with the reason if it is no text, as `documents.string` says it."""
        if self._wrong:
            raise self._wrong
        if self._has_nul:
            raise documents.nul(what)
        return self

    def pieces(self) -> Iterator[str]:
        """Yield the text, stripped of whitespace, in pieces of at most `MAX_DOCUMENT` characters; "" if it is empty."""
        with _disk():
            self._file.truncate(self._end)
            self._file.seek(0)
        stream, text = io.TextIOWrapper(self._file, encoding="utf-8", newline=""), ""
        try:
            while block := stream.read(BLOCK):
                text = text + block if text else block.lstrip()
                while len(text) > documents.MAX_DOCUMENT:
                    end = documents.cut_place(text)
                    yield text[:end].rstrip()
                    text = text[end:].lstrip()
            yield text
        finally:
            stream.detach()


@contextmanager
def _disk() -> Iterator[None]:
    """Context manager: an error of the temporary file is not one of the corpus."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{tempfile.gettempdir()}: cannot hold a long document while it is read ({error.strerror}); set "
            "TMPDIR to a folder with space"
        ) from error
