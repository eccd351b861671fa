"""Loss sums, the metrics file across kills, and where wandb records go."""

import json
import math

import pytest
import torch

from gptbert.distributed import World
from gptbert.metrics import JsonLines, LossSums, Throughput, Trackers, _wandb_mode, perplexity, read_records
from gptbert.objectives import Objective
from kernels import MaskedCrossEntropy
from tests.disk import small_disk

ALONE = World(0, 1, torch.device("cpu"))


def result(loss, z_loss, correct, count):
    loss, z_loss = torch.tensor(loss), torch.tensor(z_loss)
    return MaskedCrossEntropy(loss + z_loss, loss, z_loss, torch.tensor(correct), torch.tensor(count))


def test_means_are_over_labels_not_over_calls():
    sums = LossSums(ALONE.device)
    sums.add(Objective.MLM, result(2.0, 8.0, 1, 1))
    sums.add(Objective.MLM, result(3.0, 4.0, 0, 3))
    sums.add(Objective.CLM, result(70.0, 0.0, 5, 10))
    means = sums.means(ALONE)
    expected = {"loss": 1.25, "perplexity": math.exp(1.25), "accuracy": 0.25, "z_loss": 3.0, "count": 4}
    assert means[Objective.MLM] == pytest.approx(expected)
    assert means[Objective.CLM]["loss"] == 7.0
    assert sums.means(ALONE) == means  # reading changes nothing


def test_an_objective_without_labels_has_no_means():
    sums = LossSums(ALONE.device)
    assert sums.means(ALONE) == {}
    sums.add(Objective.CLM, result(0.0, 0.0, 0, 0))
    sums.add(Objective.MLM, result(1.0, 1.0, 0, 2))
    assert set(sums.means(ALONE)) == {Objective.MLM}


def test_many_small_losses_are_not_lost_beside_a_large_sum():
    sums = LossSums(ALONE.device)
    sums.add(Objective.CLM, result(2.0**24, 0.0, 0, 2**24))
    for _ in range(10):
        sums.add(Objective.CLM, result(0.25, 0.0, 0, 0))  # fp32 would round each away
    assert sums.means(ALONE)[Objective.CLM]["loss"] * 2**24 == 2**24 + 2.5


@pytest.mark.parametrize(
    ("loss", "expected"),
    [(0.0, 1.0), (1.0, math.e), (699.0, math.exp(699)), (710.0, math.inf), (1e30, math.inf), (math.inf, math.inf)],
)
def test_perplexity_overflows_to_infinity(loss, expected):
    assert perplexity(loss) == expected


def test_perplexity_of_no_number_is_no_number():
    assert math.isnan(perplexity(math.nan))


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
    """Whatever part of the last line was written, also all of it but its end."""
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


def test_records_are_on_the_disk_at_once(tmp_path):
    tracker = JsonLines(tmp_path / "metrics.jsonl", 0)
    tracker.log(1, {"loss": math.inf})
    assert read_records(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": math.inf}]
    tracker.close()


def test_a_file_that_is_not_there_has_no_records(tmp_path):
    assert read_records(tmp_path / "none.jsonl") == []


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
    assert files == ({"metrics.jsonl"} if rank == 0 else set())
    if rank == 0:
        assert read_records(config.run_dir / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]


def test_throughput_leaves_pauses_out_and_knows_what_was_waiting(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    throughput = Throughput(1000)
    now[0] += 2
    with throughput.paused():
        now[0] += 50
    now[0] += 3
    with throughput.waiting():
        now[0] += 5
    assert throughput.since_last(2000) == (100, 0.5)
    now[0] += 1
    assert throughput.since_last(2007) == (7, 0)


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
        ballast.write_bytes(bytes(8 << 10))  # two of its four pages; the file of records has one
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
