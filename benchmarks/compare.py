"""Training steps of this tree beside those of another commit: `python -m benchmarks.compare REF`.

Both run `benchmarks.bench_train_step` in turns, the other one in a worktree of its own, with this environment's Python
and libraries. Machines are shared and drift, so each round gives a ratio of neighbors; the median over rounds counts.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks.bench_train_step import Case
from gptbert.command_line import run_command
from gptbert.errors import InputError
from gptbert.io.screen import table

ROOT = Path(__file__).parents[1]
BENCH = "benchmarks/bench_train_step.py"
FIGURES = {"tokens/s": "tokens_per_second", "MFU": "mfu", "peak GB": "peak_gb"}

Figures = dict[str, dict[str, float]]  # of each case


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Measure this tree against another commit, in turns."""

    ref: Annotated[str, tyro.conf.Positional]
    """The other commit: a branch, a tag, HEAD~1."""
    rounds: int = 3
    """Turns of each."""
    match: str = "MLM T=128 B=32"
    """The case of this name, or all whose name contains it; "": all. Old commits know the latter only."""
    steps: int = 6
    """Steps measured in each turn."""


@contextmanager
def worktree(ref: str) -> Iterator[Path]:
    """A folder with the files of a commit, gone at the end.

    Raises:
        InputError: there is no such commit, or it cannot be measured.
    """
    found = git("rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}")
    if found.returncode:
        raise InputError(f"{ref}: no commit of this repository; `git log --oneline` shows them")
    commit = found.stdout.strip()
    if git("cat-file", "-e", f"{commit}:{BENCH}").returncode:
        raise InputError(f"{ref}: has no {BENCH}, so nothing there can be measured; take a later commit")
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        added = git("worktree", "add", "--detach", str(tree), commit)
        if added.returncode:
            raise InputError(f"{ref}: {added.stderr.strip().splitlines()[-1]}")
        try:
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree))


def git(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run git in this repository."""
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def measure(tree: Path, config: CompareConfig) -> Figures:
    """One turn of a tree.

    Raises:
        InputError: its benchmark failed; with the last line that it said.
    """
    command = [sys.executable, "-m", "benchmarks.bench_train_step", "--json"]
    options = [f"--match={config.match}", f"--steps={config.steps}"]
    done = subprocess.run([*command, *options], cwd=tree, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"{tree}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return figures(json.loads(done.stdout.splitlines()[-1]))


def figures(report: dict[str, Any]) -> Figures:
    """Of a report of `bench_train_step`; earlier ones gave a case by its name alone."""
    found = {}
    for result in report["results"]:
        case = result["case"]
        name = case if isinstance(case, str) else Case(**case).name
        found[name] = {label: result[key] for label, key in FIGURES.items()}
    return found


def compare(turn_of_this: Callable[[], Figures], turn_of_other: Callable[[], Figures], rounds: int) -> list[str]:
    """Lines of a table: this over the other, the median of neighbors and its range over the rounds."""
    pairs = []
    for number in range(rounds):  # whoever comes first alternates too
        first, second = (turn_of_this, turn_of_other) if number % 2 == 0 else (turn_of_other, turn_of_this)
        one, two = first(), second()
        pairs.append((one, two) if number % 2 == 0 else (two, one))
    rows = [["case", *FIGURES]]
    for case in [name for name in pairs[0][0] if name in pairs[0][1]]:
        cells = []
        for label in FIGURES:
            ratios = [this[case][label] / other[case][label] for this, other in pairs]
            cells.append(f"{statistics.median(ratios):.3f} ({min(ratios):.3f} – {max(ratios):.3f})")
        rows.append([case, *cells])
    return table(rows).splitlines()


def run(config: CompareConfig) -> None:
    """Measure in turns, and print the ratios.

    Raises:
        InputError: one of the trees cannot be measured.
    """
    if config.rounds < 1:
        raise InputError(f"--rounds {config.rounds}: must be at least 1")
    with worktree(config.ref) as tree:
        lines = compare(lambda: measure(ROOT, config), lambda: measure(tree, config), config.rounds)
    print(f"this tree over {config.ref}: median of {config.rounds} rounds (lowest – highest)")
    print("\n".join(lines))


if __name__ == "__main__":
    run_command(CompareConfig, run)
