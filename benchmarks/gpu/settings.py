"""The settings of a measurement, and the description of a part."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WHOLE_MINUTES = 8.0


@dataclass(frozen=True)
class Settings:
    """Settings of a run of `benchmarks.gpu`.

    Attributes:
        minutes: limit for all parts together.
        rehearse: on the CPU at toy sizes, to test the measurement itself.
        work: folder of caches, logs and intermediate files.
    """

    minutes: float
    rehearse: bool
    work: Path

    def times(self, count: int, least: int) -> int:
        """The number of repetitions, for `count` in a run of eight minutes; `least` in a rehearsal."""
        return least if self.rehearse else max(least, round(count * self.minutes / WHOLE_MINUTES))

    def result(self, name: str) -> Path:
        """The file of a part's results."""
        return self.work / "parts" / f"{file_name(name)}.json"

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `from_dict` is the inverse."""
        return {"minutes": self.minutes, "rehearse": self.rehearse, "work": str(self.work)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Settings":
        """The inverse of `to_dict`."""
        return cls(values["minutes"], values["rehearse"], Path(values["work"]))


@dataclass(frozen=True)
class Part:
    """The measurement of one process.

    Attributes:
        name: unique; names its results and its files.
        group: its name for `--only`.
        target: "module:function"; called with the settings and `options`, it yields its results so far, a dict each
            time; the last one is final.
        seconds: time limit in a run of eight minutes or less.
        options: serializable as JSON.
        needs: required packages, by import name; without them the part is skipped.
    """

    name: str
    group: str
    target: str
    seconds: float
    options: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()

    @property
    def file_name(self) -> str:
        """The name without characters that file systems reject."""
        return file_name(self.name)


def file_name(name: str) -> str:
    """A part's name without what file systems dislike."""
    return "".join(letter if letter.isalnum() else "-" for letter in name)
