"""Record files that survive kills."""

import json
import math
import tracemalloc

import pytest

from gptbert.monitoring.records import JsonLines, has_record, read_records
from gptbert.train import TrainResult


def log(path, first_step, steps):
    tracker = JsonLines(path, first_step)
    for step in steps:
        tracker.log(step, {"loss": step / 2})
    tracker.close()


def test_records_of_steps_that_come_again_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log(path, 0, [10, 20, 30, 40])
    log(path, 20, [])
    assert [record["step"] for record in read_records(path)] == [10, 20]
    log(path, 20, [30, 40])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": step, "loss": step / 2} for step in (10, 20, 30, 40)
    ]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("cut", range(1, 27))
def test_a_record_torn_by_a_kill_spoils_no_other(tmp_path, cut):
    """For a last line truncated anywhere, even if only its newline is missing."""
    path = tmp_path / "metrics.jsonl"
    log(path, 0, [10, 20])
    content = path.read_bytes()
    assert len(content.splitlines()[-1]) == 26
    path.write_bytes(content[:-cut])
    whole = [10] if cut > 1 else [10, 20]
    assert [record["step"] for record in read_records(path)] == whole
    log(path, 20, [30])
    assert [record["step"] for record in read_records(path)] == [*whole, 30]
    assert len(path.read_text().splitlines()) == len(whole) + 1


@pytest.mark.parametrize("damage", [b'{"step": 2', b"\0" * 50, b"", b"[1]", b"\xff"])
def test_a_damaged_line_costs_no_other_and_is_told(tmp_path, capfd, damage):
    path = tmp_path / "metrics.jsonl"
    log(path, 0, [10, 20, 30, 40])
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], damage, *lines[2:]]) + b"\n")
    assert [record["step"] for record in read_records(path)] == [10, 30, 40]
    assert not capfd.readouterr().err
    log(path, 30, [40])
    assert [record["step"] for record in read_records(path)] == [10, 30, 40]
    assert capfd.readouterr().err == f"{path}: 1 line without a whole record, as a crash leaves them, left out\n"
    assert len(path.read_bytes().splitlines()) == 3


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_was_deleted_meanwhile_is_begun_again(tmp_path, capfd, replaced):
    path = tmp_path / "metrics.jsonl"
    tracker = JsonLines(path, 0)
    tracker.log(1, {})
    path.unlink()
    if replaced:  # as by an editor
        path.write_text('{"step": 0}\n')
    for step in (2, 3):
        tracker.log(step, {})
    tracker.close()
    assert [record["step"] for record in read_records(path)] == [*([0] if replaced else []), 2, 3]
    assert capfd.readouterr().err.count("was deleted or replaced by another program") == 1


def test_records_are_on_the_disk_at_once(tmp_path):
    tracker = JsonLines(tmp_path / "metrics.jsonl", 0)
    tracker.log(1, {"loss": math.inf})
    assert read_records(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": math.inf}]
    tracker.close()


def test_memory_of_a_start_and_of_an_end_does_not_grow_with_the_records(tmp_path):
    """A run of weeks has a million."""
    (tmp_path / "metrics.jsonl").write_text(
        "".join(f'{{"step": {step}, "train/loss": 0.5}}\n' for step in range(20_000))
    )
    tracemalloc.start()
    assert has_record(tmp_path / "metrics.jsonl", 19_999, "train/")
    assert TrainResult.of(tmp_path, 9).training == {"step": 19_999, "train/loss": 0.5}
    log(tmp_path / "metrics.jsonl", 19_999, [])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def test_a_file_that_is_not_there_has_no_records(tmp_path):
    assert read_records(tmp_path / "none.jsonl") == []
