"""JSON values of a file that has them over several lines, one in memory at a time; long ones in pieces."""

import codecs
import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

from gptbert.errors import InputError
from gptbert.text import lines
from gptbert.text.documents import not_json
from gptbert.text.lines import Count
from gptbert.text.long_json import LongJson
from gptbert.text.long_text import LongText
from gptbert.text.opened_file import OpenedFile

_SPACE = re.compile(r"[ \t\r\n\ufeff]*")  # with the marks of files that were joined
_LONG = object()


def numbered_values(
    read: OpenedFile, count: Count, text_field: str, label_field: str | None
) -> Iterator[tuple[int, Any]]:
    """Yield the elements of a file that is one JSON array, or JSON values one after the other, over any lines.

    Args:
        read: the file.
        count: called with the number of further bytes of text.
        text_field: the field with the document in an object of more than `MAX_LINE` characters.
        label_field: another field that is wanted of such an object.

    Yields:
        The number of the line that a value begins on, and the value; of a long one what `LongJson.read` returns, which
        is to be used before the next.

    Raises:
        InputError: the file is not JSON.
    """
    values = _Values(read, count)
    array = values.next_is("[")
    first = True
    with LongText() as document:
        while values.skip_space():
            if array and values.next_is("]"):
                if values.skip_space():
                    raise values.error("more follows after the end of the array")
                return
            if array and not first and not values.next_is(","):
                raise values.error("a comma is missing")
            if not values.skip_space():
                break
            first = False
            line, found = values.value()
            yield line, values.long_value(document, text_field, label_field) if found is _LONG else found
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
        """The value that comes next, and its line; `_LONG` in its place if it may be too long for memory."""
        problem: ValueError | RecursionError | None
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                value, end, problem = None, len(self._text), error
                if not isinstance(error, json.JSONDecodeError):  # more text does not mend it
                    raise self._not_json(error) from None
            else:
                problem = None
            if end < len(self._text):
                break
            if len(self._text) - self._at > lines.MAX_LINE:
                return self._line, _LONG
            if not self._fill():  # a number may go on
                if problem:
                    raise self._not_json(problem)
                break
        line = self._line
        self._line += self._text.count("\n", self._at, end)
        self._at = end
        return line, value

    def long_value(self, document: LongText, text_field: str, label_field: str | None) -> Any:
        """The value that comes next, as `LongJson.read` returns it."""
        pieces = itertools.chain([self._text[self._at :]], iter(lambda: self._read(lines.PIECE), ""))
        self._text, self._at = "", 0
        reader = LongJson(pieces, document, text_field, label_field)
        try:
            value = reader.read()
        except (ValueError, RecursionError) as error:
            raise self._not_json(error) from None
        self._text = reader.rest
        self._line += reader.lines
        return value

    def _not_json(self, error: ValueError | RecursionError) -> InputError:
        if isinstance(error, json.JSONDecodeError):
            return self.error(error.msg.removesuffix(" at"))
        return self.error(str(not_json(error)))

    def _fill(self) -> bool:
        """Read as much again as there is, so that a long value is not parsed in many beginnings."""
        self._text = self._text[self._at :]
        self._at = 0
        text = self._read(max(lines.PIECE, min(len(self._text), lines.MAX_LINE)))
        self._text += text
        return bool(text)

    def _read(self, size: int) -> str:
        """Some text; "" at the end."""
        while self._more:
            data = self._stream.read(size)
            self._more = bool(data)
            try:
                if text := self._utf8.decode(data, final=not data):
                    return text
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{self._file}: not UTF-8 (byte 0x{error.object[error.start]:02x}, after line {self._line}); "
                    "convert it"
                ) from None
        return ""
