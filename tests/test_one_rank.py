"""What one process of several meets alone must reach the others, and the screen, in real runs."""

import errno
import os
import re
import signal
import threading
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import gptbert.train
from gptbert.checkpoint import branch, checkpoint, shards
from gptbert.distributed import world
from gptbert.errors import InputError, LostProcessError, SharedError, StoppedError
from gptbert.trainer import Trainer
from tests.runs import Ranks, flags, train, write_inputs

PATIENT = 15  # seconds of --timeout, where a test has to wait for them; a busy machine must not take as long by itself


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("one_rank"))


def run(inputs, name, prepare, **changes):
    """Output, and the exit status of each of two processes; of those that others' ends left waiting, -9."""
    ranks = Ranks(flags(inputs, name=name, **changes), 2, inputs / f"{name}.log", prepare)
    output, _ = ranks.communicate()
    return output, [process.exitcode for process in ranks.processes]


def leave_as_nccl(set_attribute):
    """Leave the process group by the rules of nccl's; destroying it takes for ever, as its kernels may."""
    own = world._leave
    set_attribute(world, "_leave", lambda backend, **how: own("nccl", **how))
    set_attribute(dist, "destroy_process_group", threading.Event().wait)


def exhaust_one(rank):
    """Memory of rank 1 is used up in its fifth step."""
    leave_as_nccl(setattr)
    own = Trainer.train_step

    def train_step(trainer, rows):
        if rank == 1 and trainer.step == 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return own(trainer, rows)

    Trainer.train_step = train_step


def test_an_error_of_one_rank_is_told_before_anything_waits(inputs):
    output, statuses = run(inputs, "exhausted", exhaust_one, timeout=20)
    assert "[rank1]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB\n" in output
    assert statuses[1] == 1, "it ended by itself"


@pytest.mark.parametrize(
    ("error", "is_destroyed"),
    [
        (None, True),
        (SharedError("the disk is full"), True),
        (StoppedError("stopped by SIGTERM"), True),
        (InputError("of this rank"), False),
        (LostProcessError("another process has ended"), False),
        (RuntimeError("CUDA error"), False),
        (KeyboardInterrupt(), False),
    ],
    ids=repr,
)
def test_a_group_of_nccl_is_destroyed_only_by_all_ranks_together(monkeypatch, make_config, error, is_destroyed):
    destroyed = []
    monkeypatch.setattr(world, "read_launch", lambda: world.Launch(0, 2, 0, 2))
    monkeypatch.setattr(world, "_join", lambda *_: dist.HashStore())
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    leave_as_nccl(monkeypatch.setattr)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: destroyed.append(True))
    with (
        pytest.raises(type(error)) if error else nullcontext(),
        world.connect(make_config(device="cpu", cpu_threads=1, huge_pages=False)),
    ):
        if error:
            raise error
    assert bool(destroyed) == is_destroyed


def stale(file):
    """What a network file system may say on one host."""
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(file))


def go_stale(bad, rank):
    """The records cannot be read on rank `bad`."""
    if rank == bad:
        gptbert.train.has_record = lambda path, *_: stale(path)


def test_records_that_one_rank_cannot_read_end_no_other_in_a_hang(inputs):
    train(inputs, "stale", max_steps=2, save_every=2)
    again = {"max_steps": 2, "resume": "auto", "timeout": 20}
    output, statuses = run(inputs, "stale", partial(go_stale, 1), **again)
    assert "stale: finished already" in output, "the main rank alone reads them"
    assert statuses == [0, 0]
    output, statuses = run(inputs, "stale", partial(go_stale, 0), **again)
    assert output.splitlines() == [f"error: {inputs}/runs/stale/metrics.jsonl: Stale file handle"]


def lose_shard(step, rank):
    """Rank 1 cannot read the shard that it has written; or finds that one is no file."""
    if rank == 1 and step == "save":
        shards.entry = stale
    elif rank == 1:
        own = Path.is_file
        Path.is_file = lambda path: not path.name.startswith("shard-") and own(path)


def test_shards_that_one_rank_cannot_read_end_all_with_one_line(inputs):
    settings = {"parallel": "fsdp", "max_steps": 2, "validate_every": 0, "save_every": 2, "timeout": 20}
    output, _ = run(inputs, "sharded", partial(lose_shard, "save"), **settings)
    assert "step_00000002: cannot be written (" in output
    assert "Stale file handle" in output
    assert output.count("error: ") == 1
    output, _ = run(inputs, "sharded", None, **settings)
    output, _ = run(inputs, "sharded", partial(lose_shard, "load"), **settings | {"max_steps": 4}, resume="auto")
    assert "the checkpoint is damaged (shards: contains something that is not a file)" in output
    assert output.count("error: ") == 1


def look_before_the_parent_saves(rank):
    """Rank 1 finds an older checkpoint of the run to branch off from."""
    if rank == 1:
        branch.newest_in = lambda run_dir: Path(run_dir) / "checkpoints" / "step_00000002"


def write_slowly(rank):
    """A save of the main rank takes longer than --timeout."""
    own = checkpoint.write_settings
    checkpoint.write_settings = lambda *settings: time.sleep(PATIENT + 5) or own(*settings)


def test_a_save_may_take_longer_than_the_timeout(inputs):
    settings = {"max_steps": 2, "save_every": 2, "validate_every": 0, "timeout": PATIENT}
    output, statuses = run(inputs, "slow", write_slowly, **settings)
    assert statuses == [0, 0], output


def halt_in_save(rank):
    """The main rank's process hangs in a save."""
    checkpoint.write_settings = lambda *_: os.kill(os.getpid(), signal.SIGSTOP)


def test_a_main_rank_that_hangs_in_a_save_ends_the_others(inputs):
    settings = {"max_steps": 2, "save_every": 2, "validate_every": 0, "timeout": PATIENT}
    output, statuses = run(inputs, "halted", halt_in_save, **settings)
    assert statuses == [-9, 1]
    assert re.search(
        r"error: rank 1: another process .*--timeout 15 s: no sign of life from the main process\)", output
    )


def test_a_branch_of_a_run_that_goes_on_begins_where_the_main_rank_says(inputs):
    settings = {"schedule": "constant", "validate_every": 0, "timeout": 20}
    train(inputs, "parent", max_steps=4, save_every=2, **settings)
    parent = inputs / "runs" / "parent"
    output, statuses = run(
        inputs, "branch", look_before_the_parent_saves, branch_from=parent, max_steps=6, warmup_proportion=0, **settings
    )
    assert statuses == [0, 0], output
    assert "a branch from step 4: " in output
