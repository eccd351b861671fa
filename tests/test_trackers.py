"""Destinations of records, across kills and failures."""

import math
import os
import shutil
import sys

import pytest
import torch
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gptbert.distributed.world import World
from gptbert.errors import InputError
from gptbert.io import environment
from gptbert.monitoring.records import read_records
from gptbert.monitoring.trackers import TensorBoard, Trackers, _wandb_mode, id_of
from tests.disk import small_disk
from tests.runs import Ranks, flags, wait_for_record, write_inputs

KEY = "0123456789abcdef" * 3  # of no one
OWN = {"WANDB_BASE_URL": "https://wandb.example.org"}


@pytest.fixture
def login(monkeypatch, tmp_path):
    """Sets variables and what `wandb login` has written, for a host, as on a machine where nobody is logged in."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in [name for name in os.environ if name.startswith("WANDB_") or name == "NETRC"]:
        monkeypatch.delenv(name)

    def set_up(variables, host):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        if host:
            machine = wandb.Settings().base_url.partition("//")[2] if host == "default" else host
            (tmp_path / ".netrc").write_text(f"machine {machine}\n  login user\n  password {KEY}\n")
            (tmp_path / ".netrc").chmod(0o600)

    wandb.teardown()
    yield set_up
    wandb.teardown()


@pytest.mark.parametrize(
    ("variables", "host", "mode"),
    [
        ({}, None, "offline"),
        ({}, "default", "online"),  # of the installed version, whichever it is
        ({}, "example.org", "offline"),
        (OWN, "wandb.example.org", "online"),
        (OWN, "default", "offline"),
        ({"WANDB_API_KEY": KEY}, None, "online"),
        ({"WANDB_API_KEY": ""}, None, "offline"),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, None, "offline"),
        ({"WANDB_MODE": "", "WANDB_BASE_URL": ""}, "default", "online"),
        ({"WANDB_MODE": "disabled"}, "default", "disabled"),
        ({"WANDB_MODE": "online"}, None, "online"),
    ],
)
def test_wandb_is_online_only_for_those_who_logged_in(login, capfd, variables, host, mode):
    login(variables, host)
    environment.drop_empty("WANDB_")
    assert _wandb_mode() == mode
    says_why = mode == "offline" and not variables.get("WANDB_MODE")
    assert capfd.readouterr().err.splitlines() == (
        ["wandb records offline, since nobody is logged in (wandb login; --wandb_mode offline says that it is meant)"]
        if says_why
        else []
    )


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WANDB_MODE": "of"}, "WANDB_MODE is 'of', expected online or offline or disabled; unset it"),
        ({"WANDB_API_KEY": "k"}, "WANDB_API_KEY.*wandb login"),
        ({"WANDB_SILENT": "abc"}, "^WANDB_SILENT is 'abc': .*; unset it, or --trackers without wandb$"),
        ({"WANDB_RUN_ID": "a/b"}, r"^wandb: Run ID .* \(WANDB_RUN_ID in the environment\); unset it, or --trackers"),
        ({"WANDB_BASE_URL": "nonsense", "WANDB_API_KEY": KEY}, "WANDB_BASE_URL is 'nonsense': .*valid URL"),
        (
            {"WANDB_BASE_URL": "nonsense", "WANDB_MODE": "offline"},
            "WANDB_BASE_URL is 'nonsense': .*valid URL.*; unset it",
        ),
        ({"WANDB_INIT_TIMEOUT": "soon", "WANDB_MODE": "offline"}, "WANDB_INIT_TIMEOUT is 'soon', .* number of seconds"),
        ({"WANDB_INIT_TIMEOUT": "-1", "WANDB_MODE": "offline"}, "WANDB_INIT_TIMEOUT is '-1', expected a positive"),
    ],
)
def test_variables_of_wandb_that_cannot_be_used_are_named(login, make_config, tmp_path, variables, message):
    login(variables, None)
    config = make_config(output_dir=tmp_path)
    config.run_dir.mkdir()
    with pytest.raises(InputError, match=message) as error:
        Trackers(config, World(0, 1, torch.device("cpu")), {}, 0)
    assert KEY not in str(error.value)


def test_a_copied_run_is_another_one_in_wandb(tmp_path, capfd):
    run, copy = tmp_path / "run", tmp_path / "copy"
    run.mkdir()
    first = id_of(run)
    run = run.rename(tmp_path / "moved")
    assert id_of(run) == id_of(run) == first, "one that is moved, or goes on, is the same"
    assert not capfd.readouterr().err
    shutil.copytree(run, copy)
    assert first != id_of(copy) == id_of(copy)
    assert capfd.readouterr().err == f"{copy} is a copy of {run}, so wandb records it as another run\n"
    (run / "wandb_id").write_text("12345678")
    assert id_of(run) == "12345678", "of an earlier version"


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
    killed = Ranks(arguments, 1, tmp_path / "killed.log")
    wait_for_record(killed, run, 25)  # includes a validation record
    killed.kill()
    (first_events,) = (run / "tensorboard").iterdir()
    assert scalars(first_events)["train/loss"][-1][0] > 20, "killed too early to show anything"
    output, status = Ranks(arguments, 1, tmp_path / "resumed.log").communicate()
    assert status == 0, output
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
    assert {folder.name.rpartition("-")[2] for folder in offline} == {id_of(run)}


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
