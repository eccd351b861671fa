"""Files of records: one JSON object per line, each with its step."""

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_LONGEST_RECORD = 1 << 20  # bytes; a longer line is damaged


class JsonLines:
    """Writes one JSON object per line, with its step; each immediately, and completely or not at all.

    Opening drops records of steps after `first_step`: a killed run wrote them, and this one will write them again.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        temporary = path.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(line for line, record in _records(path) if record["step"] <= first_step)
        temporary.replace(path)
        self._file = path.open("ab", buffering=0)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Append a record."""
        line = (json.dumps({"step": step, **values}) + "\n").encode()
        size = os.fstat(self._file.fileno()).st_size
        if self._file.write(line) < len(line):  # disk full: remove the part, since readers stop at a broken line
            self._file.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def forget_from(path: Path, step: int) -> None:
    """Drop the records of `step` and of later steps."""
    if path.is_file():
        JsonLines(path, step - 1).close()


def is_recorded(path: Path, step: int, prefix: str) -> bool:
    """Whether a file has a record of this step whose names begin with `prefix`."""
    records = read_records(path)
    return any(record["step"] == step and any(name.startswith(prefix) for name in record) for record in records)


def read_records(path: Path) -> list[dict[str, Any]]:
    """All records of a file; a last line truncated by a kill is omitted."""
    return [record for _, record in _records(path)]


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Lines and their records, up to the first invalid line."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        while line := file.readline(_LONGEST_RECORD):
            try:
                text = line.decode("utf-8").rstrip("\n") + "\n"
                record = json.loads(text)
                record["step"] += 0
            except (ValueError, TypeError, KeyError, RecursionError):
                return
            yield text, record
