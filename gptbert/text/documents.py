"""Documents: the text of a JSON value or of a table's row, and the places where a long one is cut."""

import json
from collections.abc import Iterator
from typing import Any

from gptbert.text.lines import MAX_LINE

MAX_DOCUMENT = 1 << 20  # characters, so that what reads and encodes documents takes bounded memory


def decode(content: bytes) -> str:
    """UTF-8 bytes as text; ValueError with the reason if they are not UTF-8."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(error) from None


def not_utf8(error: UnicodeDecodeError) -> ValueError:
    """The reason, as users are told it."""
    return ValueError(f"not UTF-8 (byte 0x{error.object[error.start]:02x} at column {error.start + 1})")


def parse_json(line: bytes) -> Any:
    """The JSON value on a line; ValueError with the reason if there is none."""
    if len(line) > MAX_LINE:
        raise ValueError(f"the line has more than {MAX_LINE:,} bytes, the most for JSON (plain text has no limit)")
    try:
        return json.loads(decode(line.rstrip(b"\r\n")))
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg.removesuffix(' at')} at column {error.colno})") from None
    except RecursionError:
        raise ValueError("not a document (JSON nested too deeply)") from None


def string_field(values: dict[str, Any], name: str) -> str:
    """A text in a JSON object; ValueError with the reason if there is none."""
    if name not in values:
        raise ValueError(f"the object has no `{name}`")
    return string(values[name], f"`{name}`")


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
            code = f"\\u{ord(value[error.start]):04x}"
            raise ValueError(f"half a surrogate pair, {code}, is not a character") from None
    if "\0" in value:
        raise ValueError(f"{what} has a NUL, which no text has")
    return value


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
