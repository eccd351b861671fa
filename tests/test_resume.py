"""A run killed with SIGKILL at a random step and resumed is, to the bit, the run that was never killed."""

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from gptbert.checkpoint import list_checkpoints
from gptbert.metrics import read_records
from tests.runs import flags, start, train, write_inputs

STEPS, SAVE_EVERY = 46, 5


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("resume"))


def kill_at(step, arguments, world_size, metrics):
    """Launch a run and kill all of its processes once `step` has been recorded."""
    process = start(arguments, world_size)
    deadline = time.monotonic() + 120
    while not metrics.exists() or len(read_records(metrics)) < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    workers = [process.pid]  # torchrun starts workers in sessions of their own, so find them by their command line
    for command_line in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if f"--name={metrics.parent.name}\0".encode() in command_line.read_bytes():
                workers.append(int(command_line.parent.name))
    for worker in workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)
    process.wait()


def assert_same(one, other, path=""):
    """Equal to the bit, through dictionaries, lists and tensors."""
    assert type(one) is type(other), path
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_same(left, right, f"{path}/{index}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    else:
        assert one == other, path


SPEED = {"train/tokens_per_second", "train/mfu", "train/waiting_share", "train/peak_memory_gb"}


def without_speed(records):
    return [{name: value for name, value in record.items() if name not in SPEED} for record in records]


@pytest.mark.parametrize(
    ("optimizer", "world_size", "more"),
    [
        ("lamb", 3, {"hybrid_mode": "batch", "mixed_precision": True, "mask_history": True}),
        ("adamw", 1, {"log_every": 3, "seq_length_growth": True}),
    ],
)
def test_killed_and_resumed_equals_undisturbed(inputs, optimizer, world_size, more):
    settings = {
        "optimizer": optimizer,
        "max_steps": STEPS,
        "save_every": SAVE_EVERY,
        "keep_checkpoints": 2,
        "global_batch_size": 24,
        "validate_every": 9,
        "validation_steps": 1,
        **more,
    }
    undisturbed = train(inputs, f"{optimizer}-whole", world_size, **settings)
    name = f"{optimizer}-killed"
    run = inputs / "runs" / name
    # in the first half, so that a slow machine still kills it long before its end
    records_at_kill = random.randint(2, len(undisturbed) // 2)
    kill_at(records_at_kill, flags(inputs, name=name, **settings), world_size, run / "metrics.jsonl")
    assert read_records(run / "metrics.jsonl")[-1]["step"] < STEPS, "killed too late to show anything"
    resumed = train(inputs, name, world_size, **settings, resume="auto")
    assert without_speed(resumed) == without_speed(undisturbed), f"killed after {records_at_kill} records"
    ends = [list_checkpoints(inputs / "runs" / folder) for folder in (f"{optimizer}-whole", name)]
    assert [[path.name for path in paths] for paths in ends] == [["step_00000045", "step_00000046"]] * 2
    for file in ("model.safetensors", "ema.safetensors"):
        assert (ends[0][-1] / file).read_bytes() == (ends[1][-1] / file).read_bytes()
    states = [torch.load(paths[-1] / "training_state.pt", weights_only=True) for paths in ends]
    assert_same(*states)
    assert not list((run / "checkpoints").glob(".*")), "nothing half-written is left"


def test_resume_with_other_ranks_goes_on_with_the_same_losses(inputs):
    settings = {
        "config_file": inputs / "no_dropout.json",
        "hybrid_mode": "batch",
        "max_steps": 8,
        "save_every": 4,
        "validate_every": 0,
        "log_every": 1,
    }
    whole = train(inputs, "ranks-whole", 1, **settings)
    train(inputs, "ranks", 2, **settings)
    first_half = inputs / "runs" / "ranks" / "checkpoints" / "step_00000004"
    again = train(inputs, "ranks-resumed", 1, **settings, resume=first_half)
    assert [record["train/loss"] for record in again if "train/loss" in record] == pytest.approx(
        [record["train/loss"] for record in whole if "train/loss" in record and record["step"] > 4], rel=1e-5
    )
