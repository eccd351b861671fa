"""BabyLM's evaluation folder, `evaluation_data/full_eval` or `fast_eval`: a folder per task."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gptbert.errors import InputError, listed
from gptbert.io.files import visible_files
from gptbert.scoring import reading_times
from gptbert.scoring.acquisition import CHILDREN, CONTEXTS, Acquisition
from gptbert.scoring.choices import Choices, read_choices
from gptbert.scoring.reading_times import ReadingTimes

FOLDERS = {
    "blimp": ("blimp_filtered", "blimp_fast"),
    "supplement": ("supplement_filtered", "supplement_fast"),
    "ewok": ("ewok_filtered", "ewok_fast"),
    "entity_tracking": ("entity_tracking", "entity_tracking_fast"),
    "comps": ("comps",),
    "wug_adj": ("wug_adj_nominalization",),
    "wug_past": ("wug_past_tense",),
    "reading": ("reading",),
    "aoa": ("aoa", "cdi_childes"),
}  # by task: its folder's possible names


@dataclass(frozen=True)
class Task:
    """A task of the folder, read.

    Attributes:
        folder: where it was found.
        files: those that were read.
        content: its items.
    """

    folder: Path
    files: tuple[Path, ...]
    content: Choices | ReadingTimes | Acquisition


def read_tasks(data: Path, wanted: Sequence[str] | None = None) -> tuple[dict[str, Task], dict[str, str]]:
    """Read the tasks, in the order of `FOLDERS`, and say why others are left out.

    Args:
        data: the folder.
        wanted: tasks that must be there; None for all that are.

    Returns:
        Tasks by name, and reasons by name.

    Raises:
        InputError: there are none, a wanted one is missing, or a file is damaged; names file and line.
    """
    if not data.is_dir():
        raise InputError(f"DATA {data}: no such folder")
    tasks, left_out = {}, {}
    for name, folders in FOLDERS.items():
        if wanted is not None and name not in wanted:
            left_out[name] = "not in --tasks"
            continue
        there = [data / folder for folder in folders if (data / folder).is_dir()]
        reason = _missing(name, there) if there else f"no folder {' or '.join(folders)}"
        if reason is None:
            tasks[name] = _read(name, there)
        elif wanted is None:
            left_out[name] = reason
        else:
            raise InputError(f"--tasks {name}: {data} has {reason}")
    if not tasks:
        inside = sorted(folder.name for folder in data.glob("*_eval") if folder.is_dir())
        way_on = f"name one of {listed(inside, 4)} in it" if inside else "expected folders such as blimp_filtered"
        raise InputError(f"DATA {data}: has none of BabyLM's zero-shot tasks; {way_on}")
    return tasks, left_out


def _missing(name: str, folders: Sequence[Path]) -> str | None:
    """What a task's folders lack; None if they are complete."""
    if name == "aoa":
        for file in (CONTEXTS, CHILDREN):
            if not any((folder / file).is_file() for folder in folders):
                return f"no {file} in {' or '.join(folder.name for folder in folders)}"
        return None
    if name == "reading":
        return None if (folders[0] / reading_times.FILE).is_file() else f"no {reading_times.FILE} in {folders[0].name}"
    return None if visible_files(folders[0], "*.jsonl") else f"no .jsonl file in {folders[0].name}"


def _read(name: str, folders: Sequence[Path]) -> Task:
    folder = folders[0]
    if name == "aoa":
        contexts, children = (
            next(each / file for each in folders if (each / file).is_file()) for file in (CONTEXTS, CHILDREN)
        )
        return Task(folder, (contexts, children), Acquisition(contexts, children))
    if name == "reading":
        return Task(folder, (folder / reading_times.FILE,), ReadingTimes(folder))
    return Task(folder, tuple(visible_files(folder, "*.jsonl")), read_choices(name, folder))
