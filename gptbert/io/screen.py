"""Screen output of commands: lines above the progress bar, tables."""

import sys
from collections.abc import Sequence

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
