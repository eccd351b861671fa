"""Comparing two trees in alternation: per-round ratios, and one line if a commit cannot be measured."""

import subprocess
from itertools import count

import pytest

from benchmarks import compare
from gptbert.errors import InputError


def figures(speed):
    return {"MLM": {"tokens/s": speed, "MFU": speed / 2000, "peak GB": 2.0}}


def test_ratios_are_of_neighbors_and_turns_alternate():
    order, slowdown = [], {0: 1, 1: 5, 2: 2}  # of the machine, by round

    def turn(name, speed):
        rounds = count()

        def measured():
            order.append(name)
            return figures(speed / slowdown[next(rounds)])

        return measured

    header, line = compare.compare(turn("this", 1200.0), turn("other", 1000.0), rounds=3)
    assert order == ["this", "other", "other", "this", "this", "other"]
    assert header.split() == ["case", "tokens/s", "MFU", "peak", "GB"]
    assert line.split("  ")[0] == "MLM"
    assert line.count("1.200 (1.200 – 1.200)") == 2
    assert "1.000 (1.000 – 1.000)" in line


def test_a_case_that_only_one_tree_has_is_left_out():
    both = {**figures(1.0), "new": figures(1.0)["MLM"]}
    assert len(compare.compare(lambda: both, lambda: figures(1.0), rounds=1)) == 2


def test_cases_are_names_or_objects():
    shared = {"tokens_per_second": 1.0, "mfu": 0.5, "peak_gb": 2.0}
    case = {"objective": "MLM", "seq_length": 128, "rows": 32, "ranks": 2}
    found = compare.figures({"results": [{"case": "CLM T=128 B=32", **shared}, {"case": case, **shared}]})
    assert list(found) == ["CLM T=128 B=32", "MLM T=128 B=32 2 ranks"]


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of two commits: the first lacks the benchmark."""
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    for arguments in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    bench = tmp_path / compare.BENCH
    bench.parent.mkdir()
    bench.write_text("raise SystemExit('this one is broken')")
    for arguments in (["add", "-A"], [*identity, "commit", "-q", "-m", "second"]):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    return tmp_path


@pytest.mark.parametrize(("ref", "message"), [
    ("nosuch", "nosuch: no commit of this repository"),
    ("HEAD~1", "HEAD~1: has no benchmarks/bench_train_step.py"),
])  # fmt: skip
def test_a_commit_that_cannot_be_measured(repository, ref, message):
    with pytest.raises(InputError, match=message), compare.worktree(ref):
        pass


def test_a_benchmark_that_fails_is_one_line_and_leaves_no_worktree(repository):
    with compare.worktree("HEAD") as tree:
        assert (tree / compare.BENCH).exists()
        with pytest.raises(InputError, match="this one is broken"):
            compare.measure(tree, compare.CompareConfig(ref="HEAD"))
    assert not tree.exists()
    listed = subprocess.run(["git", "worktree", "list"], cwd=repository, capture_output=True, text=True, check=True)
    assert len(listed.stdout.splitlines()) == 1
