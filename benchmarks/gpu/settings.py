"""What every part of a measurement is told, and what a part is."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WHOLE_MINUTES = 8.0


@dataclass(frozen=True)
class Settings:
    """Of a run of `benchmarks.gpu`.

    Attributes:
        minutes: that all parts together may take.
        rehearse: on the CPU at toy sizes, to try the measurement itself.
        work: folder of caches, logs, and what parts write on the way.
    """

    minutes: float
    rehearse: bool
    work: Path

    def times(self, count: int, least: int) -> int:
        """How often something is done that is done `count` times in a run of eight minutes; `least` in a rehearsal."""
        return least if self.rehearse else max(least, round(count * self.minutes / WHOLE_MINUTES))

    def result(self, name: str) -> Path:
        """Where a part of this name writes what it knows."""
        return self.work / "parts" / f"{file_name(name)}.json"

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; `from_dict` reads it."""
        return {"minutes": self.minutes, "rehearse": self.rehearse, "work": str(self.work)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Settings":
        """What `to_dict` gave."""
        return cls(values["minutes"], values["rehearse"], Path(values["work"]))


@dataclass(frozen=True)
class Part:
    """What one process measures.

    Attributes:
        name: unique; of its results and its files.
        group: what `--only` calls it.
        target: "module:function"; called with the settings and `options`, it yields what it knows so far, a dict each
            time, the last of which is its result.
        seconds: that it may take in a run of eight minutes or less.
        options: that JSON can write.
        needs: packages without which it is left out, by the names that one imports.
    """

    name: str
    group: str
    target: str
    seconds: float
    options: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()

    @property
    def file_name(self) -> str:
        """The name without what file systems dislike."""
        return file_name(self.name)


def file_name(name: str) -> str:
    """A part's name without what file systems dislike."""
    return "".join(letter if letter.isalnum() else "-" for letter in name)
