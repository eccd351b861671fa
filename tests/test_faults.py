"""Faults of long runs, inflicted on real runs; docs/faults.md states the guarantee for each."""

import os
import random
import re
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from gptbert.checkpoint import manifest
from gptbert.checkpoint.folder import list_checkpoints
from gptbert.command_line import STOPPED
from gptbert.monitoring.records import read_records
from tests.disk import small_disk
from tests.runs import Ranks, assert_same_end, flags, kill, start, train, wait_for_record, workers, write_inputs

STEPS = 40
SETTINGS = {
    "hybrid_mode": "batch",
    "max_steps": STEPS,
    "save_every": 10,
    "keep_checkpoints": 9,
    "validate_every": 15,
    "validation_steps": 1,
    "log_every": 1,
}
RANDOM = random.Random(20)  # the same times and places in every run of this file


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def undisturbed(inputs):
    """Folders of uninterrupted runs, by number of processes."""
    for world_size in (1, 2):
        train(inputs, f"undisturbed-{world_size}", world_size, **SETTINGS)
    return {world_size: inputs / "runs" / f"undisturbed-{world_size}" for world_size in (1, 2)}


@pytest.fixture
def launch(inputs):
    """Returns a function that starts runs as a user does; kills all their remaining processes at the end."""
    started = []

    def launch(name, world_size=1, *torchrun, **changes):
        process = start(flags(inputs, name=name, **SETTINGS | changes), world_size, *torchrun)
        started.append((process, name))
        return process

    yield launch
    for process, name in started:
        kill(process, name)


@pytest.fixture
def fork(inputs):
    """Returns a function that starts runs in less time, for faults that do not concern torchrun or Python's start."""
    started = []

    def fork(name, world_size=1, **changes):
        arguments = flags(inputs, name=name, **SETTINGS | changes)
        started.append(Ranks(arguments, world_size, inputs / f"{name}.log"))
        return started[-1]

    yield fork
    for ranks in started:
        ranks.kill()


def test_a_rank_that_is_killed_is_started_again_by_torchrun(inputs, undisturbed, launch):
    run = inputs / "runs" / "rank-killed"
    process = launch("rank-killed", 2, "--max_restarts=1", resume="auto")
    wait_for_record(process, run, RANDOM.randint(11, STEPS // 2))
    os.kill(workers("rank-killed")[RANDOM.randint(0, 1)], signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "going on from" in output
    assert re.search(r"error: rank [01]: another process has ended.*--timeout", output)
    assert_same_end(run, undisturbed[2])


def test_a_signal_saves_at_the_next_step_and_the_run_goes_on(inputs, undisturbed, launch, fork):
    """Each signal once, one after the other, to the same run; the first to a run that was started as by a user."""
    run, steps = inputs / "runs" / "signals", []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        process = (launch if number == signal.SIGTERM else fork)("signals", resume="auto")
        wait_for_record(process, run, len(read_records(run / "metrics.jsonl")) + RANDOM.randint(3, 6))
        process.send_signal(number)
        output, _ = process.communicate()
        assert process.poll() == STOPPED == 75, output
        lines = output.splitlines()
        assert f"{number.name}: saving a checkpoint at the next step, then stopping" in lines
        assert re.fullmatch(rf"stopped by {number.name} after step \d+, .*--resume auto goes on", lines[-1])
        steps.append(int(list_checkpoints(run)[-1].name.removeprefix("step_")))
        assert read_records(run / "metrics.jsonl")[-1]["step"] == steps[-1], "no step after the one that is saved"
    assert steps == sorted(set(steps))
    assert steps[-1] < STEPS, "too late to show anything"
    train(inputs, "signals", resume="auto", **SETTINGS)
    assert_same_end(run, undisturbed[1])


@pytest.mark.parametrize("target", ["one rank", "torchrun"])
def test_all_ranks_stop_at_the_same_step(inputs, undisturbed, launch, fork, target):
    """A signal to any one rank stops all ranks; a signal to torchrun is forwarded to all of them."""
    name = f"signal to {target}"
    run = inputs / "runs" / name
    process = (launch if target == "torchrun" else fork)(name, 2, resume="auto")
    wait_for_record(process, run, RANDOM.randint(11, 20))
    if target == "torchrun":
        process.terminate()
    else:
        os.kill(process.processes[1].pid, signal.SIGUSR1)
    output, _ = process.communicate()
    assert process.poll() != 0
    assert re.search(r"stopped by .* after step \d+, with a checkpoint in", output), output
    last = int(list_checkpoints(run)[-1].name.removeprefix("step_"))
    assert last < STEPS
    assert last == read_records(run / "metrics.jsonl")[-1]["step"]
    assert not workers(name)
    train(inputs, name, 2, resume="auto", **SETTINGS)
    assert_same_end(run, undisturbed[2])


def flip_a_bit(path):
    with path.open("r+b") as file:
        position = RANDOM.randrange(path.stat().st_size)
        file.seek(position)
        byte = file.read(1)[0] ^ 1 << RANDOM.randrange(8)
        file.seek(position)
        file.write(bytes([byte]))


def cut_short(path):
    os.truncate(path, RANDOM.randrange(path.stat().st_size))


def test_damaged_checkpoints_are_named_and_the_one_before_is_used(inputs, undisturbed, fork):
    run = inputs / "runs" / "damaged"
    shutil.copytree(undisturbed[2], run)
    damages = {
        40: ("ema.safetensors", flip_a_bit),
        30: ("training_state.pt", cut_short),
        20: ("model.safetensors", os.remove),
    }
    for step, (file, damage) in damages.items():
        damage(run / "checkpoints" / f"step_{step:08d}" / file)
    output, status = fork("damaged", 2, resume="auto").communicate()
    assert status == 0, output
    for step, (file, _) in damages.items():
        assert re.search(rf"step_{step:08d} is damaged \({file}: .*, set aside as step_{step:08d}\.damaged", output), (
            output
        )
        assert (run / "checkpoints" / f"step_{step:08d}.damaged").is_dir()
    assert re.search("going on from .*step_00000010", output)
    assert_same_end(run, undisturbed[2])


@pytest.fixture
def full_disk(tmp_path, undisturbed):
    """A disk with room for two and a half checkpoints."""
    (one, *_) = list_checkpoints(undisturbed[1])
    with small_disk(tmp_path, int(2.5 * sum(file.stat().st_size for file in one.iterdir()))) as disk:
        yield disk


def test_a_full_disk_leaves_the_old_checkpoints_and_a_clear_error(undisturbed, fork, full_disk):
    run = full_disk / "full"
    output, status = fork("full", output_dir=full_disk).communicate()
    assert status == 1
    line = output.splitlines()[-1]
    assert re.fullmatch(r"error: checkpoint .*step_00000030: cannot be written \(.*\); .* MB are free there", line), (
        output
    )
    assert [path.name for path in list_checkpoints(run)] == ["step_00000010", "step_00000020"]
    for path in list_checkpoints(run):
        manifest.check(path)
    assert not list((run / "checkpoints").glob(".*"))
    subprocess.run(["mount", "-o", "remount,size=1g", str(full_disk)], check=True)
    output, status = fork("full", output_dir=full_disk, resume="auto").communicate()
    assert status == 0, output
    assert_same_end(run, undisturbed[1])


def test_a_rank_that_hangs_ends_the_others_with_a_line_each(inputs, fork):
    ranks = fork("hangs", 3, timeout=5)
    wait_for_record(ranks, inputs / "runs" / "hangs", 3)
    others = dict(enumerate(ranks.processes))
    hung = others.pop(RANDOM.randint(0, 2))
    os.kill(hung.pid, signal.SIGSTOP)
    for process in others.values():
        process.join(300)  # far more than the run's own timeout: CI machines are shared
        assert process.exitcode == 1
    output, _ = ranks.communicate()  # kills the last, as torchrun does after half a minute
    said = re.findall(r"error: rank (\d): another process .*--timeout 5 s.*--resume auto", output)
    assert sorted(map(int, said)) == sorted(others), output


def wandb_services(pid):
    """Process ids of wandb's child processes."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if b"wandb" in Path(f"/proc/{child}/cmdline").read_bytes()]


def test_wandb_out_of_reach_or_killed_does_not_end_a_run(inputs, fork, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    for name, value in (("API_KEY", "a" * 40), ("BASE_URL", nobody), ("INIT_TIMEOUT", "2")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    run = inputs / "runs" / "wandb"
    process = fork("wandb", wandb_mode="online", max_steps=100, save_every=0, validate_every=0)
    wait_for_record(process, run, 3)
    process.send_signal(signal.SIGSTOP)  # until its services are dead, so that it does not end before
    assert list((run / "wandb").glob("offline-run-*"))
    services = wandb_services(process.processes[0].pid)
    assert services
    for pid in services:
        os.kill(pid, signal.SIGKILL)
    process.send_signal(signal.SIGCONT)
    output, status = process.communicate()
    assert status == 0, output
    assert output.count("recording offline") == 1
    assert output.count("wandb fails") == 1, output
    assert read_records(run / "metrics.jsonl")[-1]["step"] == 100
