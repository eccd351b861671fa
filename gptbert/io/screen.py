"""Screen output of commands: lines above the progress bar, tables."""

import sys
from collections.abc import Sequence

from tqdm import tqdm


def log(line: str) -> None:
    """Print a line above the progress bar."""
    tqdm.write(line, file=sys.stderr)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Format rows of equal length with aligned columns: the first to the left, the others to the right."""
    first, *others = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join([row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], others, strict=True))])
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
