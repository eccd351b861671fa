"""Files of records: one JSON object per line, each with its step."""

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptbert.io.files import replacing
from gptbert.io.screen import log

_LONGEST_RECORD = 1 << 20  # bytes; a longer line is damaged


class JsonLines:
    """Writes one JSON object per line, with its step; each immediately, and completely or not at all.

    Opening drops records of steps after `first_step`: a killed run wrote them, and this one will write them again. It
    also drops lines that are no records, and says so.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        broken = 0
        with replacing(path) as new, new.open("w", encoding="utf-8") as file:
            for line, record in _lines(path):
                broken += record is None
                if record and record["step"] <= first_step:
                    file.write(line)
        if broken:
            log(f"{path}: {broken} line{'s'[: broken > 1]} without a whole record, as a crash leaves them, left out")
        self._path = path
        self._file = path.open("ab", buffering=0)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Append a record."""
        self._find_again()
        line = (json.dumps({"step": step, **values}) + "\n").encode()
        size = os.fstat(self._file.fileno()).st_size
        if self._file.write(line) < len(line):  # disk full: remove the part, since it would spoil the next record
            self._file.truncate(size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _find_again(self) -> None:
        """Go on in the file of this name if the one that was opened has been deleted or replaced."""
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self._file.fileno()), self._path.stat()):
                return
        file = self._path.open("ab", buffering=0)
        self._file.close()
        self._file = file
        log(f"{self._path}: was deleted or replaced by another program; records go on in the file of that name")


def forget_from(path: Path, step: int) -> None:
    """Drop the records of `step` and of later steps."""
    if path.is_file():
        JsonLines(path, step - 1).close()


def has_record(path: Path, step: int, prefix: str) -> bool:
    """Whether a file has a record of this step whose names begin with `prefix`."""
    return any(
        record["step"] == step and any(name.startswith(prefix) for name in record) for record in records_of(path)
    )


def read_records(path: Path) -> list[dict[str, Any]]:
    """All records of a file, which take some 3.5 KB each; see `records_of`."""
    return list(records_of(path))


def records_of(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file, one in memory at a time; lines without a whole one, as a kill leaves them, are omitted."""
    return (record for _, record in _lines(path) if record)


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Lines, each with its record, or None if it has no whole one."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        while line := file.readline(_LONGEST_RECORD):
            try:
                text = line.decode("utf-8").rstrip("\n") + "\n"
                record = json.loads(text)
                record["step"] += 0
            except (ValueError, TypeError, KeyError, RecursionError):
                yield "", None
            else:
                yield text, record
