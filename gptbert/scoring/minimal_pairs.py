"""Minimal pairs: JSONL files with BLiMP's fields (Warstadt et al. 2020, arXiv 1912.00582), and accuracy on them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gptbert.errors import InputError
from gptbert.io.files import visible_files
from gptbert.text.documents import keys_of, label_field, parse_json, string_field
from gptbert.text.lines import file_lines

_EXPECTED = "an object with `sentence_good` and `sentence_bad`"
BLIMP_GROUP = "UID"  # BLiMP's field for the paradigm of a pair


@dataclass(frozen=True)
class MinimalPair:
    """Two sentences with a minimal difference that makes one of them unacceptable.

    Attributes:
        good: the acceptable one.
        bad: the unacceptable one.
        groups: value of each field that pairs are grouped by.
        file: the file it comes from.
        line: line number, from 1.
    """

    good: str
    bad: str
    groups: dict[str, str]
    file: Path
    line: int


def read_pairs(paths: Sequence[Path], group_by: Sequence[str] | None = None) -> list[MinimalPair]:
    """Read every line of files, and of the `.jsonl` and `.jsonl.gz` files in folders, sorted by name, hidden ones not.

    Args:
        paths: files and folders.
        group_by: fields that every line must have; None groups by `UID` if every line has it, else not at all.

    Raises:
        InputError: a path does not exist, or a line is not a pair; names file and line.
    """
    fields = [BLIMP_GROUP] if group_by is None else list(dict.fromkeys(group_by))
    pairs = []
    for file in {file: None for path in paths for file in _files(path)}:
        for number, line in file_lines(file):
            if not line.strip():
                continue
            try:
                pairs.append(_parse_pair(line, fields, file, number, optional=group_by is None))
            except ValueError as error:
                raise InputError(f"{file}:{number}: {error}") from None
    if not pairs:
        raise InputError(f"{' '.join(map(str, paths))}: holds no minimal pairs")
    if group_by is None and not all(pair.groups for pair in pairs):
        return [MinimalPair(pair.good, pair.bad, {}, pair.file, pair.line) for pair in pairs]
    return pairs


@dataclass(frozen=True)
class Accuracy:
    """Fractions of pairs whose good sentence has the higher score; ties count as wrong.

    Attributes:
        micro: over all pairs.
        groups: by field and value.
    """

    micro: float
    groups: dict[str, dict[str, float]]

    @property
    def macro(self) -> dict[str, float]:
        """By field, the mean over its values. By UID this is BLiMP's number."""
        return {field: sum(values.values()) / len(values) for field, values in self.groups.items()}

    @property
    def headline(self) -> float:
        """The criterion to compare temperatures: the mean over the values of the first field, or over all pairs."""
        return next(iter(self.macro.values()), self.micro)

    @classmethod
    def of(cls, pairs: Sequence[MinimalPair], good_scores: np.ndarray, bad_scores: np.ndarray) -> "Accuracy":
        """Accuracy from scores [pairs], higher for likelier sentences."""
        correct = good_scores > bad_scores
        groups = {
            field: {value: float(correct[chosen].mean()) for value, chosen in members(pairs, field).items()}
            for field in pairs[0].groups
        }
        return cls(float(correct.mean()), groups)


def members(pairs: Sequence[MinimalPair], field: str) -> dict[str, list[int]]:
    """Indices of the pairs with each value of a field, in order of first appearance."""
    found: dict[str, list[int]] = {}
    for index, pair in enumerate(pairs):
        found.setdefault(pair.groups[field], []).append(index)
    return found


def _parse_pair(line: bytes, fields: Sequence[str], file: Path, number: int, *, optional: bool) -> MinimalPair:
    try:
        values = parse_json(line)
    except ValueError as error:  # of JSON over several lines, too
        raise ValueError(f"{error}; expected {_EXPECTED} on each line") from None
    if not isinstance(values, dict):
        raise ValueError(f"is no {_EXPECTED.removeprefix('an ')}")  # noqa: TRY004  a bad line, not a bug
    if not optional and (missing := [field for field in fields if field not in values]):
        raise ValueError(f"the object has no `{missing[0]}`, only {keys_of(values)} (--group_by names others)")
    sentences = [string_field(values, name) for name in ("sentence_good", "sentence_bad")]
    for name, sentence in zip(("sentence_good", "sentence_bad"), sentences, strict=True):
        if not sentence.strip():
            raise ValueError(f"`{name}` is empty, which would be likelier than any sentence")
    present = [field for field in fields if field in values or not optional]
    return MinimalPair(
        sentences[0], sentences[1], {field: label_field(values, field) for field in present}, file, number
    )


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if not path.is_dir():
        return [path]
    files = visible_files(path, "**/*.jsonl", "**/*.jsonl.gz")
    if not files:
        raise InputError(f"{path}: the folder holds no .jsonl file")
    return files
