"""Training steps of this tree compared with a different commit: `python -m benchmarks.compare REF`.

The two alternate in running `benchmarks.bench_train_step`, the other commit in a separate worktree, with this
environment's Python and libraries. Machines are shared and drift, so each round gives a ratio of adjacent runs; the
result is the median over rounds.
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

from benchmarks import ROOT
from benchmarks.bench_train_step import Case
from gptbert.command_line import run_command
from gptbert.errors import InputError
from gptbert.io.screen import table

BENCH = "benchmarks/bench_train_step.py"
FIGURES = {"tokens/s": "tokens_per_second", "MFU": "mfu", "peak GB": "peak_gb"}

Figures = dict[str, dict[str, float]]  # per case


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Measure this tree and a different commit, alternating."""

    ref: Annotated[str, tyro.conf.Positional]
    """The other commit: a branch, a tag, HEAD~1."""
    rounds: int = 3
    """Rounds."""
    match: str = "MLM T=128 B=32"
    """The case of this name, or all whose name contains it; "": all. Old commits support only the latter."""
    steps: int = 6
    """Steps per measurement."""


@contextmanager
def worktree(ref: str) -> Iterator[Path]:
    """Context manager: a folder with the files of a commit, removed at the end.

    Raises:
        InputError: the commit does not exist, or cannot be measured.
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
    """One measurement of a tree.

    Raises:
        InputError: its benchmark failed; with the last line of its output.
    """
    command = [sys.executable, "-m", "benchmarks.bench_train_step", "--json"]
    options = [f"--match={config.match}", f"--steps={config.steps}"]
    done = subprocess.run([*command, *options], cwd=tree, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"{tree}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return figures(json.loads(done.stdout.splitlines()[-1]))


def figures(report: dict[str, Any]) -> Figures:
    """Figures from a report of `bench_train_step`; earlier versions identified a case by its name only."""
    found = {}
    for result in report["results"]:
        case = result["case"]
        name = case if isinstance(case, str) else Case(**case).name
        found[name] = {label: result[key] for label, key in FIGURES.items()}
    return found


def compare(turn_of_this: Callable[[], Figures], turn_of_other: Callable[[], Figures], rounds: int) -> list[str]:
    """Rows of a table: the ratio of this tree to the other, its median and range over the rounds."""
    pairs = []
    for number in range(rounds):  # the order alternates too
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
    """Measure alternately, and print the ratios.

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
