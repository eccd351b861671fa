"""Screen output of commands: lines above the progress bar, tables, and screens that are gone."""

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm


def log(line: str) -> None:
    """Print a line above the progress bar."""
    tqdm.write(line, file=sys.stderr)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Format rows of equal length with aligned columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(table_row(row, widths) for row in rows)


def table_row(row: Sequence[str], widths: Sequence[int]) -> str:
    """Format one row of such a table, for printing row by row; `widths` are those of its columns."""
    first, *others = row
    cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
    return "  ".join(cells).rstrip()


def provide_streams() -> None:
    """Open the null device where a standard stream is closed (`>&-`, as some daemons start programs).

    Otherwise the next file, such as a run's records, would get its number, and what is meant for the screen.
    """
    handle = os.open(os.devnull, os.O_RDWR)
    while handle <= 2:
        os.set_inheritable(handle, True)
        handle = os.open(os.devnull, os.O_RDWR)
    os.close(handle)
    for number, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w", encoding="utf-8", closefd=False))


class Lasting:
    """A stream whose failures to write are ignored.

    Whoever reads a run's screen may go before the run: a terminal is closed, a Ctrl-C ends the `tee` of `2>&1 | tee`
    first, the disk of a log file is full. That costs lines, and not the steps since the last checkpoint.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """See `io.TextIOBase`."""
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """See `io.IOBase`."""
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
