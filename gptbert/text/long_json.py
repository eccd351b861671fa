"""A JSON value that is too long for memory, walked over in pieces; it is refused where `json.loads` would refuse it."""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from gptbert.text.documents import MAX_DOCUMENT
from gptbert.text.long_text import LongText

MAX_DEPTH = 900  # of arrays and objects in each other; json.loads takes about as many
_SHALLOW = 8  # depth to which it is tried whether a value is short: in vain, if it is not
_NAMES = 10  # of other fields, to say which there are
_LITERAL = len("-Infinity")
_TOKEN = 10_000  # characters, of which a number has fewer
_CONTEXT = 64  # characters that json.loads gets, to say what is wrong with the first of them
_SPACE = re.compile(r"[ \t\n\r]*+")
_CHARACTERS = re.compile(r'(?:[^"\\\x00-\x1f]++|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*+')  # of a string
_SHORT_VALUES = re.compile(  # each with a comma behind it, such as the numbers of a long array
    r'(?:(?:-?(?:0|[1-9][0-9]{0,99})(?:\.[0-9]{1,99})?(?:[eE][-+]?[0-9]{1,9})?|true|false|null|"[^"\\\x00-\x1f]*+")'
    r"[ \t\n\r]*+,[ \t\n\r]*+)*+"
)
_CLOSING = {"{": "}", "[": "]"}
_raw_decode = json.JSONDecoder().raw_decode


class LongJson:
    """A JSON value that comes in pieces: its document goes into a LongText, the beginning of its label is kept.

    Of fields of the same name the last one counts, as with `json.loads`.
    """

    def __init__(self, pieces: Iterator[str], document: LongText, text_field: str, label_field: str | None) -> None:
        """Begin.

        Args:
            pieces: text that begins with the value.
            document: where the document goes: a string by itself, or an object's `text_field`.
            text_field: its name.
            label_field: the name of another field that is wanted.
        """
        self._pieces = pieces
        self._document = document
        self._text_field = text_field
        self._label_field = label_field
        self._record: dict[str, Any] = {}
        self._text, self._at = "", 0
        self._characters = self._lines = 0  # before `_text`
        self._comma = 0  # the place of the last one

    @property
    def rest(self) -> str:
        """What was taken from the pieces and is not read yet."""
        return self._text[self._at :]

    @property
    def lines(self) -> int:
        """Ends of lines that were read."""
        return self._lines + self._text.count("\n", 0, self._at)

    def read(self) -> Any:
        """Read the value.

        Returns:
            The LongText for the document; of an object the wanted fields and the first others. Of a label of more than
            `MAX_DOCUMENT` characters, a beginning that has more too. Numbers, true, false and null are what they are,
            other strings empty, other objects and arrays too.

        Raises:
            json.JSONDecodeError: this is not JSON; its place is in characters from the beginning.
            ValueError: a number has too many digits.
            RecursionError: it is nested too deeply.
        """
        containers: list[str] = []  # that are open
        result: Any = None
        name = before = ""  # of the value that comes; and JSON after which it may come
        while True:
            first = self._next()
            if first == '"':
                value = self._string_value(containers, name)
            elif first in _CLOSING and first:
                value = {} if first == "{" else []
            else:
                value = self._scalar(before)
            if not containers:
                result = self._record if first == "{" else value
            elif containers == ["{"]:
                self._keep(name, value)
            if first in _CLOSING and not (0 < len(containers) <= _SHALLOW and self._skip()):
                self._at += 1
                containers.append(first)
                if len(containers) > MAX_DEPTH:
                    raise RecursionError
                if self._next() != _CLOSING[first]:
                    name, before = self._before_value(first, first)
                    continue
            while containers and self._next() == _CLOSING[containers[-1]]:
                self._at += 1
                containers.pop()
            if not containers:
                return result
            before = '{"":""' if containers[-1] == "{" else '[""'
            if self._next() != ",":
                self._fail(before, self._comma)
            self._comma = self._characters + self._at
            self._at += 1
            name, before = self._before_value(containers[-1], f"{before},")

    def end(self) -> None:
        """Raise json.JSONDecodeError if more than whitespace follows."""
        if self._next():
            self._fail('""', 0)

    def _keep(self, name: str, value: Any) -> None:
        wanted = name in (self._text_field, self._label_field)
        if wanted or name in self._record or len(self._record) < _NAMES:
            self._record[name] = value

    def _before_value(self, container: str, before: str) -> tuple[str, str]:
        """Go to a value in an object or array: its name, and JSON after which it may come."""
        if container == "[":
            self._next()
            end = _end(_SHORT_VALUES, self._text, self._at)
            if end > self._at:
                self._comma = self._characters + self._text.rindex(",", self._at, end)
                self._at, before = end, '["",'
            return "", before
        if self._next() != '"':
            self._fail(before, self._comma)
        name = self._short_string()
        if self._next() != ":":
            self._fail('{""', 0)
        self._at += 1
        return name, '{"":'

    def _string_value(self, containers: list[str], name: str) -> Any:
        in_record = containers == ["{"]
        if not containers or (in_record and name == self._text_field):
            self._document.clear()
            self._string(self._document.add)
            return self._document
        if in_record and name == self._label_field:
            return self._short_string()
        self._string(lambda _: None)
        return ""

    def _short_string(self) -> str:
        """A string, or a beginning of it that is longer than `MAX_DOCUMENT`."""
        kept = ""

        def keep(piece: str) -> None:
            nonlocal kept
            if len(kept) <= MAX_DOCUMENT:
                kept += piece

        self._string(keep)
        return kept

    def _string(self, use: Callable[[str], object]) -> None:
        """Go over a string, whose pieces are used."""
        start = self._characters + self._at
        self._at += 1
        while True:
            end = _end(_CHARACTERS, self._text, self._at)
            piece = self._text[self._at : end]
            if "\\" in piece:
                piece = json.loads(f'"{piece}"')
            ended = self._text[end : end + 1] == '"'
            may_go_on = not ended and (
                end == len(self._text) or (self._text[end] == "\\" and len(self._text) - end < 6)
            )
            if may_go_on and "\ud800" <= piece[-1:] <= "\udbff":  # the first of a pair, written \\uD800
                piece, end = piece[:-1], end - 6
            use(piece)
            self._at = end + ended
            if ended:
                return
            if not (may_go_on and self._fill()):
                self._fail('"', start)

    def _scalar(self, before: str) -> Any:
        """A number, true, false or null."""
        while True:
            here, value, size = len(self._text) - self._at, None, 0
            try:
                value, end = _raw_decode(self._text, self._at)
                size = end - self._at
            except json.JSONDecodeError:
                pass
            known = here > size + 2 if size else here > _LITERAL  # behind "1" may come ".5" or "e+5"
            if not known and here > _TOKEN:
                raise ValueError("a number of too many digits")
            if known or not self._fill():
                break
        if not size:
            self._fail(before, self._comma)
        self._at += size
        return value

    def _skip(self) -> bool:
        """Go over an object or array at once, if all of it is there."""
        try:
            _, self._at = _raw_decode(self._text, self._at)
        except (ValueError, RecursionError):
            return False
        return True

    def _next(self) -> str:
        """Go to the next character that is no whitespace; "" at the end."""
        while (at := _end(_SPACE, self._text, self._at)) == len(self._text):
            self._at = at
            if not self._fill():
                return ""
        self._at = at
        return self._text[at]

    def _fill(self) -> bool:
        """Read on, and forget what is behind."""
        piece = next(self._pieces, "")
        self._characters += self._at
        self._lines += self._text.count("\n", 0, self._at)
        self._text = self._text[self._at :] + piece
        self._at = 0
        return bool(piece)

    def _fail(self, before: str, start: int) -> NoReturn:
        """Raise json.JSONDecodeError for what comes next, as `json.loads` does.

        Args:
            before: some JSON after which it comes.
            start: a place, if the error is in that.
        """
        while len(self._text) - self._at < _CONTEXT and self._fill():
            pass
        message, place = "Expecting value", self._characters + self._at
        before = before or " "[: place > 0]  # a mark is one only at the beginning
        try:
            json.loads(before + self._text[self._at : self._at + _CONTEXT])
        except json.JSONDecodeError as error:
            message = error.msg
            place = place + error.pos - len(before) if error.pos >= len(before) else start
        raise json.JSONDecodeError(message, "", place)


def _end(pattern: re.Pattern[str], text: str, at: int) -> int:
    """Where a pattern that matches everywhere ends."""
    found = pattern.match(text, at)
    return found.end() if found else at
