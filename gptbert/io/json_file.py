"""JSON files: untrusted ones read in bounded memory with clear errors, our own written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptbert.errors import InputError
from gptbert.io.formats import format_of

_OBJECT_BYTES = 1 << 20


def read_json(path: Path, most_bytes: int, unique_keys: bool = False) -> Any:
    """Parse a UTF-8 JSON file. Python objects take up to about 25 times the size of the text.

    Args:
        path: a file; pipes and devices, which may never end, are refused.
        most_bytes: refuse larger files.
        unique_keys: refuse duplicate keys, of which Python would take the last.

    Raises:
        ValueError: it cannot be parsed; the message is one line.
        FileNotFoundError: there is no such file.
    """
    if not path.exists():
        raise FileNotFoundError(path)
    if not path.is_file():
        raise ValueError("is no file")
    if (size := path.stat().st_size) > most_bytes:
        raise ValueError(f"{size:,} bytes, more than {most_bytes:,}")
    hook: Callable[[list[tuple[str, Any]]], Any] | None = _unique_keys if unique_keys else None
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(error.strerror) from error
    try:
        return json.loads(content.decode(), object_pairs_hook=hook)
    except ValueError as error:
        if known := format_of(content):
            raise ValueError(f"it is {known}") from error
        raise
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_object(path: Path, unique_keys: bool = False) -> dict[str, Any]:
    """Parse a JSON object of at most 1 MB; `unique_keys` as for `read_json`.

    Raises:
        InputError: it is missing or damaged; names the file.
    """
    try:
        content = read_json(path, _OBJECT_BYTES, unique_keys)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object")
    return content


def write_json(path: Path, values: Any) -> None:
    """Write a value as human-readable JSON."""
    path.write_text(json.dumps(values, indent=4) + "\n", encoding="utf-8")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"key {key} is given twice")
        values[key] = value
    return values
