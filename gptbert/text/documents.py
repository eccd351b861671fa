"""Documents: the text of a JSON value or of a table's row, and the places where a long one is cut."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any

MAX_DOCUMENT = 1 << 20  # characters, so that what reads and encodes documents takes bounded memory

_LOOKED_AT = 500  # characters of a document, for its encoding
_WINDOWS = {  # the characters that WINDOWS-1252 has for bytes which are controls in Latin-1
    ord(bytes([byte]).decode("cp1252")): byte
    for byte in range(0x80, 0xA0)
    if byte not in (0x81, 0x8D, 0x8F, 0x90, 0x9D)  # no characters
}
_TWO_BYTES = re.compile(f"[\xc2-\xf4][\x80-\xbf{''.join(map(chr, _WINDOWS))}]")  # of UTF-8, as two characters
_NOTATIONS = (("b'", "'"), ('b"', '"'), ("['", "']"), ('{"', "}"))


def decode(content: bytes) -> str:
    """UTF-8 bytes as text; ValueError with the reason if they are not UTF-8."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(error) from None


def not_utf8(error: UnicodeDecodeError, before: int = 0) -> ValueError:
    """The reason, as users are told it; `before` is the number of bytes of the line before those that it is about."""
    return ValueError(f"not UTF-8 (byte 0x{error.object[error.start]:02x} at column {before + error.start + 1})")


def read_wrongly(text: str) -> str:
    """How a document whose UTF-8 was read as WINDOWS-1252 or Latin-1 should begin; "" for all others."""
    if not _TWO_BYTES.search(text, 0, _LOOKED_AT):
        return ""
    try:
        meant, _ = codecs.utf_8_decode(text[:_LOOKED_AT].translate(_WINDOWS).encode("latin-1"), "strict", False)
    except UnicodeError:
        return ""
    return "" if meant.isascii() else meant


def is_notation(text: str) -> bool:
    """Whether a document is what a program writes of texts: Python's bytes or lists, or JSON in a string."""
    return len(text) > len("b''") and any(text.startswith(start) and text.endswith(end) for start, end in _NOTATIONS)


def parse_json(line: bytes) -> Any:
    """The JSON value on a line; ValueError with the reason if there is none."""
    text = decode(line.rstrip(b"\r\n"))
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise not_json(error) from None


def not_json(error: ValueError | RecursionError) -> ValueError:
    """The reason of an error of `json.loads`, as users are told it."""
    if isinstance(error, json.JSONDecodeError):
        return ValueError(f"not JSON ({error.msg.removesuffix(' at')} at column {error.colno})")
    deep = isinstance(error, RecursionError)
    return ValueError(f"not a document (JSON {'nested too deeply' if deep else 'with a number of too many digits'})")


def string_field(values: dict[str, Any], name: str) -> str:
    """A text in a JSON object; ValueError with the reason if there is none."""
    if name not in values:
        raise ValueError(f"the object has no `{name}`, only {keys_of(values)}")
    return string(values[name], f"`{name}`")


def keys_of(values: dict[str, Any]) -> str:
    """The first fields of a JSON object, for a message."""
    return ", ".join(f"`{field[:50]}`" for field in list(values)[:10]) or "nothing"


def label_field(values: dict[str, Any], name: str) -> str:
    """A label in a JSON object, possibly a number or a boolean; ValueError with the reason if there is none."""
    value = values.get(name)
    return json.dumps(value) if isinstance(value, bool | int | float) else string_field(values, name)


def string(value: Any, what: str) -> str:
    """A JSON or table value that must be text; ValueError with the reason if it is not."""
    if isinstance(value, bytes):  # from a table
        value = decode(value)
    elif not isinstance(value, str):
        kind = _JSON_NAMES.get(type(value), f"of type {value}")
        raise ValueError(f"{what} is {kind}, not a string")  # noqa: TRY004  a bad line, not a bug
    else:
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise half_a_pair(error) from None
    if "\0" in value:
        raise nul(what)
    return value


def half_a_pair(error: UnicodeEncodeError) -> ValueError:
    """The reason why a string of JSON is no text: an escape that is half of a character."""
    return ValueError(f"half a surrogate pair, \\u{ord(error.object[error.start]):04x}, is not a character")


def nul(what: str) -> ValueError:
    """The reason why a string of JSON with such an escape is no text."""
    return ValueError(f"{what} has a NUL, which no text has")


def cut(text: str) -> Iterator[str]:
    """A document without whitespace at its ends, in pieces of at most `MAX_DOCUMENT` characters."""
    start = 0
    while len(text) - start > MAX_DOCUMENT:
        end = cut_place(text, start)
        yield text[start:end].rstrip()
        start = end
        while text[start].isspace():
            start += 1
    yield text[start:]


def cut_place(text: str, start: int = 0) -> int:
    """Where to cut a text that has more than `MAX_DOCUMENT` characters from `start` on.

    After the last end of a line that leaves at least half of them, else after such a space, else after all of them.
    """
    most = start + MAX_DOCUMENT
    for mark in ("\n", " "):
        if (place := text.rfind(mark, start + MAX_DOCUMENT // 2, most)) >= 0:
            return place + 1
    return most


_JSON_NAMES = {dict: "an object", list: "an array", int: "a number", float: "a number", bool: "a boolean"}
_JSON_NAMES[type(None)] = "null"
