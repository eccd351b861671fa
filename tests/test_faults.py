"""Faults of long runs, inflicted on real runs; docs/faults.md states the guarantee for each."""

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from gptbert.checkpoint import manifest
from gptbert.checkpoint.folder import list_checkpoints
from gptbert.command_line import STOPPED
from gptbert.monitoring.records import read_records
from tests.disk import small_disk
from tests.runs import assert_same_end, flags, kill, start, train, wait_for_record, workers, write_inputs

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
    """Returns a function that starts runs; kills all their remaining processes at the end."""
    started = []

    def launch(name, world_size=1, *torchrun, variables=None, **changes):
        arguments = flags(inputs, name=name, **SETTINGS | changes)
        process = start(arguments, world_size, *torchrun, **variables or {})
        started.append((process, name))
        return process

    yield launch
    for process, name in started:
        kill(process, name)


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


def test_a_signal_saves_at_the_next_step_and_the_run_goes_on(inputs, undisturbed, launch):
    """Each signal once, one after the other, to the same run."""
    run, steps = inputs / "runs" / "signals", []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        process = launch("signals", resume="auto")
        wait_for_record(process, run, len(read_records(run / "metrics.jsonl")) + RANDOM.randint(3, 6))
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == STOPPED == 75, output
        lines = output.splitlines()
        assert f"{number.name}: saving a checkpoint at the next step, then stopping" in lines
        assert re.fullmatch(rf"stopped by {number.name} after step \d+, .*--resume auto goes on", lines[-1])
        steps.append(int(list_checkpoints(run)[-1].name.removeprefix("step_")))
        assert read_records(run / "metrics.jsonl")[-1]["step"] == steps[-1], "no step after the one that is saved"
    assert steps == sorted(set(steps))
    assert steps[-1] < STEPS, "too late to show anything"
    process = launch("signals", resume="auto")
    assert process.wait(timeout=60) == 0
    assert_same_end(run, undisturbed[1])


@pytest.mark.parametrize("target", ["one rank", "torchrun"])
def test_all_ranks_stop_at_the_same_step(inputs, undisturbed, launch, target):
    """A signal to any one rank stops all ranks; a signal to torchrun is forwarded to all of them."""
    name = f"signal to {target}"
    run = inputs / "runs" / name
    process = launch(name, 2, resume="auto")
    wait_for_record(process, run, RANDOM.randint(11, 20))
    if target == "torchrun":
        process.terminate()
    else:
        os.kill(workers(name)[1], signal.SIGUSR1)
    output, _ = process.communicate(timeout=90)
    assert process.returncode != 0
    assert re.search(r"stopped by .* after step \d+, with a checkpoint in", output), output
    last = int(list_checkpoints(run)[-1].name.removeprefix("step_"))
    assert last < STEPS
    assert last == read_records(run / "metrics.jsonl")[-1]["step"]
    assert not workers(name)
    assert launch(name, 2, resume="auto").wait(timeout=60) == 0
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


def test_damaged_checkpoints_are_named_and_the_one_before_is_used(inputs, undisturbed, launch):
    run = inputs / "runs" / "damaged"
    shutil.copytree(undisturbed[2], run)
    damages = {
        40: ("ema.safetensors", flip_a_bit),
        30: ("training_state.pt", cut_short),
        20: ("model.safetensors", os.remove),
    }
    for step, (file, damage) in damages.items():
        damage(run / "checkpoints" / f"step_{step:08d}" / file)
    process = launch("damaged", 2, resume="auto")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
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


def test_a_full_disk_leaves_the_old_checkpoints_and_a_clear_error(inputs, undisturbed, launch, full_disk):
    run = full_disk / "full"
    process = launch("full", output_dir=full_disk)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    line = output.splitlines()[-1]
    assert re.fullmatch(r"error: checkpoint .*step_00000030: cannot be written \(.*\); .* MB are free there", line), (
        output
    )
    assert [path.name for path in list_checkpoints(run)] == ["step_00000010", "step_00000020"]
    for path in list_checkpoints(run):
        manifest.check(path)
    assert not list((run / "checkpoints").glob(".*"))
    subprocess.run(["mount", "-o", "remount,size=1g", str(full_disk)], check=True)
    assert launch("full", output_dir=full_disk, resume="auto").wait(timeout=60) == 0
    assert_same_end(run, undisturbed[1])


def test_a_rank_that_hangs_ends_the_others_with_a_line_each(inputs, launch):
    timeout = 5
    run = inputs / "runs" / "hangs"
    process = launch("hangs", 3, timeout=timeout)
    wait_for_record(process, run, 3)
    ranks = workers("hangs")
    hung = ranks.pop(RANDOM.randint(0, 2))
    os.kill(hung, signal.SIGSTOP)
    stopped_at = time.monotonic()
    while any(rank in ranks for rank in workers("hangs")):
        assert time.monotonic() < stopped_at + timeout + 30  # CI machines are shared
        time.sleep(0.1)
    os.kill(hung, signal.SIGKILL)  # torchrun does so after half a minute
    output, _ = process.communicate(timeout=60)
    said = re.findall(r"error: rank (\d): another process .*--timeout 5 s.*--resume auto", output)
    assert sorted(map(int, said)) == sorted(ranks), output


def wandb_services(pid):
    """Process ids of wandb's child processes."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if b"wandb" in Path(f"/proc/{child}/cmdline").read_bytes()]


def test_wandb_out_of_reach_or_killed_does_not_end_a_run(inputs, launch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    variables = {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": nobody, "WANDB_INIT_TIMEOUT": "2"}
    run = inputs / "runs" / "wandb"
    process = launch("wandb", wandb_mode="online", variables=variables, max_steps=300, save_every=0, validate_every=0)
    wait_for_record(process, run, 3)
    assert list((run / "wandb").glob("offline-run-*"))
    services = wandb_services(process.pid)
    assert services
    for pid in services:
        os.kill(pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert output.count("recording offline") == 1
    assert output.count("wandb fails") == 1, output
    assert read_records(run / "metrics.jsonl")[-1]["step"] == 300
