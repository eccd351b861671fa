"""Columns of a CSV file with a header; empty cells, and names for nothing that pandas knows, are missing values."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gptbert.errors import InputError, first_line

_MISSING = {
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
    "NULL", "NaN", "None", "n/a", "nan", "null",
}  # fmt: skip


class CsvTable:
    """A CSV file in memory.

    Attributes:
        names: of its columns.
        lines: the number of the line that each row ends on, from 1.

    Raises:
        InputError: it cannot be read, or a row has more or fewer cells than the header; names file and line.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._rows: list[list[str]] = []
        self.lines: list[int] = []
        try:
            with file.open(encoding="utf-8-sig", newline="") as opened:
                reader = csv.reader(opened, strict=True)
                self.names = next(reader, [])
                for row in reader:
                    if len(row) not in {0, len(self.names)}:
                        raise InputError(
                            f"{file}:{reader.line_num}: has {len(row)} cells, and the header {len(self.names)}"
                        )
                    if row:
                        self._rows.append(row)
                        self.lines.append(reader.line_num)
        except csv.Error as error:
            raise InputError(f"{file}:{reader.line_num}: not CSV ({first_line(error)})") from None
        except UnicodeDecodeError:
            raise InputError(f"{file}: is not UTF-8 text") from None
        except OSError as error:
            raise InputError(f"{file}: cannot be read ({error.strerror})") from error

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._rows)

    def cells(self, name: str) -> list[str]:
        """A column as it is written.

        Raises:
            InputError: there is none of that name.
        """
        if name not in self.names:
            raise InputError(f"{self._file}: has no column {name}, only {', '.join(self.names) or 'none at all'}")
        column = self.names.index(name)
        return [row[column] for row in self._rows]

    def texts(self, name: str) -> list[str | None]:
        """A column of texts, None for missing ones."""
        return [None if cell in _MISSING else cell for cell in self.cells(name)]

    def numbers(self, name: str) -> np.ndarray:
        """A column of numbers [rows] fp64, NaN for missing ones.

        Raises:
            InputError: a cell is not a finite number; names file and line.
        """
        values = []
        for cell, line in zip(self.cells(name), self.lines, strict=True):
            try:
                values.append(math.nan if cell in _MISSING else float(cell))
            except ValueError:
                values.append(math.inf)
            if math.isinf(values[-1]):
                raise InputError(f"{self._file}:{line}: {name} is {cell!r}, expected a number")
        return np.array(values)

    def columns(self, names: Sequence[str]) -> np.ndarray:
        """Columns of numbers [rows, columns], as `numbers`."""
        return np.stack([self.numbers(name) for name in names], axis=1)
