"""Destinations of records, across kills and failures."""

import math
import sys

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gptbert.distributed.world import World
from gptbert.errors import InputError
from gptbert.monitoring.records import read_records
from gptbert.monitoring.trackers import TensorBoard, Trackers, _wandb_mode
from tests.disk import small_disk
from tests.runs import flags, kill, start, wait_for_record, write_inputs


@pytest.mark.parametrize(
    ("environment", "netrc", "mode"),
    [
        ({}, None, "offline"),
        ({}, "machine api.wandb.ai login user password k", "online"),
        ({}, "machine example.org login user password k", "offline"),
        ({}, "not a netrc", "offline"),
        ({"WANDB_API_KEY": "k"}, None, "online"),
        ({"WANDB_API_KEY": ""}, None, "offline"),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, None, "offline"),
        ({"WANDB_MODE": "disabled"}, "machine api.wandb.ai login user password k", "disabled"),
    ],
)
def test_wandb_is_online_only_for_those_who_logged_in(monkeypatch, tmp_path, environment, netrc, mode):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if netrc:
        (tmp_path / ".netrc").write_text(netrc)
        (tmp_path / ".netrc").chmod(0o600)
    assert _wandb_mode() == mode


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_main_rank_writes(make_config, tmp_path, rank):
    config = make_config(output_dir=tmp_path, wandb_mode="disabled")
    config.run_dir.mkdir()
    with Trackers(config, World(rank, 2, torch.device("cpu")), {}, 0) as trackers:
        trackers.log(1, {"loss": 2.0})
    files = {file.name for file in config.run_dir.iterdir()}
    assert files == ({"metrics.jsonl", "samples.jsonl"} if rank == 0 else set())
    if rank == 0:
        assert read_records(config.run_dir / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]


@pytest.fixture
def tiny_disk(tmp_path):
    with small_disk(tmp_path, 16 << 10) as disk:
        yield disk


def test_a_full_disk_costs_records_and_not_the_run(make_config, tiny_disk, capfd):
    config = make_config(output_dir=tiny_disk, wandb_mode="disabled")
    config.run_dir.mkdir()
    ballast = tiny_disk / "ballast"
    with Trackers(config, World(0, 1, torch.device("cpu")), {}, 0) as trackers:
        trackers.log(1, {"loss": 2.0})
        ballast.write_bytes(bytes(8 << 10))  # two of the disk's four pages; the records file has one
        for step in range(2, 9):
            trackers.log(step, {"x" * 1000: float(step)})
        trackers.log(9, {"y" * 5000: 9.0})
        trackers.log(10, {"y" * 5000: 10.0})
        ballast.unlink()
        trackers.log(11, {"loss": 1.0})
    steps = [record["step"] for record in read_records(config.run_dir / "metrics.jsonl")]
    assert steps[-1] == 11
    assert steps[:-1] == list(range(1, len(steps))), "those before the disk was full"
    assert len(steps) < 10, "or the disk was not full"
    said = capfd.readouterr().err
    assert said.count("metrics.jsonl fails") == 1
    assert "No space left on device" in said


class Failing:
    def log(self, step, values):
        raise ValueError("of its own")

    def close(self):
        raise KeyError


def test_a_tracker_that_fails_does_not_keep_others_from_records(make_config, tmp_path, capfd):
    config = make_config(output_dir=tmp_path, wandb_mode="disabled")
    config.run_dir.mkdir()
    with Trackers(config, World(0, 1, torch.device("cpu")), {}, 0) as trackers:
        trackers._trackers = {"failing": Failing(), **trackers._trackers}
        for step in (1, 2):
            trackers.log(step, {"loss": 2.0})
    assert [record["step"] for record in read_records(config.run_dir / "metrics.jsonl")] == [1, 2]
    assert capfd.readouterr().err.splitlines() == ["failing fails (of its own); training goes on"]


def scalars(path):
    """Scalars in a TensorBoard event file or folder: {name: [(step, value)]}."""
    events = EventAccumulator(str(path), size_guidance={"scalars": 0})
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_trackers_of_a_run_that_was_killed_hold_each_record_once(tmp_path):
    inputs = write_inputs(tmp_path)
    arguments = flags(inputs, name="both", resume="auto", max_steps=46, save_every=20, wandb_mode="offline")
    arguments += ["--trackers", "wandb", "tensorboard"]
    run = inputs / "runs" / "both"
    process = start(arguments)
    wait_for_record(process, run, 25)  # includes a validation record
    kill(process, "both")
    (first_events,) = (run / "tensorboard").iterdir()
    assert scalars(first_events)["train/loss"][-1][0] > 20, "killed too early to show anything"
    process = start(arguments)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "step_00000020" in output
    expected = {}
    for record in read_records(run / "metrics.jsonl"):
        for name in record.keys() - {"step"}:
            expected.setdefault(name, []).append((record["step"], record[name]))
    shown = scalars(run / "tensorboard")
    assert len(list((run / "tensorboard").iterdir())) == 2
    assert [step for step, _ in shown["train/loss"]] == list(range(1, 47))
    assert [step for step, _ in shown["validation/clm/loss"]] == [10, 20, 30, 40, 46]
    assert shown.keys() == expected.keys()
    for name in shown:
        assert shown[name] == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected[name]], name
    offline = list((run / "wandb").glob("offline-run-*"))
    assert len(offline) == 2
    assert {folder.name.rpartition("-")[2] for folder in offline} == {(run / "wandb_id").read_text()}


def test_tensorboard_takes_what_is_no_number(make_config, tmp_path):
    config = make_config(output_dir=tmp_path)
    tracker = TensorBoard(config, 0)
    tracker.log(3, {"loss": math.inf, "other": math.nan, "rows": 128})
    tracker.close()
    shown = scalars(config.run_dir / "tensorboard")
    assert shown["loss"] == [(3, math.inf)]
    assert shown["rows"] == [(3, 128)]
    assert math.isnan(shown["other"][0][1])


def test_without_tensorboard_there_is_one_line(make_config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    config = make_config(output_dir=tmp_path, trackers=("tensorboard",))
    config.run_dir.mkdir()
    with pytest.raises(InputError, match=r"^--trackers tensorboard: .*pip install tensorboard brings it"):
        Trackers(config, World(0, 1, torch.device("cpu")), {}, 0)
