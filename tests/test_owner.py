"""One writer for a run's folder and for every output: locks, leases, and what the second process is told."""

import errno
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace

import numpy as np
import pytest

from gptbert.checkpoint.folder import list_checkpoints
from gptbert.command_line import run_command
from gptbert.config import TrainConfig
from gptbert.data.token_store import TokenStore, TokenStoreWriter
from gptbert.errors import OwnedError
from gptbert.io import owner
from gptbert.io.outputs import new_folder, staged_outputs
from gptbert.io.owner import Owner, owned, whereabouts
from gptbert.report import write_report
from gptbert.train import fit
from gptbert.trainer import Trainer
from tests.runs import ROOT, flags, forked_ranks, write_inputs

HOLD = (
    "import os, sys, time, pathlib; from gptbert.io import owner; owner.RENEWAL = 0.05\n"
    "with owner.owned(pathlib.Path(sys.argv[1]), 'RUN'):\n"
    "    if not os.fork(): os.close(1); time.sleep(20); os._exit(0)  # a child that outlives it\n"
    "    print('owns', flush=True); time.sleep(300)"
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "run" / "owner.json"


def no_locks(*_):
    raise OSError(errno.ENOLCK, "No locks available")


@pytest.fixture(params=["locks", "no locks"])
def locks(request, monkeypatch):
    """With the kernel's locks, and on a file system without them."""
    monkeypatch.setattr(owner, "RENEWAL", 0.05)
    monkeypatch.setattr(owner, "_SETTLING", 0.02)
    if request.param == "no locks":
        monkeypatch.setattr(owner.fcntl, "flock", no_locks)
    return request.param


@pytest.fixture
def holder(path):
    """Another process that owns `path`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "owns\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_is_told_who_owns_it_and_nothing_is_left(locks, path):
    with owned(path, "--name: here", "go away"):
        said = path.read_text()
        who = rf"--name: here: is in use by process {os.getpid()} on .+, since \d{{4}}-.*: .*; go away"
        with pytest.raises(OwnedError, match=who), owned(path, "--name: here", "go away"):
            pass
        assert path.read_text() == said
    assert not path.parents[1].exists()
    with owned(path, "again"):
        pass


def test_what_was_written_stays(locks, path):
    with owned(path, "RUN"):
        (path.parent / "result").touch()
    assert [file.name for file in path.parent.iterdir()] == ["result"]


def test_a_killed_owner_frees_at_once(locks, path, holder):
    with pytest.raises(OwnedError, match=f"process {holder.pid} "), owned(path, "RUN"):
        pass
    holder.kill()
    holder.wait()
    with owned(path, "RUN"):
        assert Owner.read(path).pid == os.getpid()


def test_many_at_once_own_it_one_after_another(path):
    """Also while owners remove their file, which others have opened already."""
    inside, most, turns = [], [], []

    def take():
        while len(turns) < 60:
            try:
                with owned(path, "RUN"):
                    inside.append(1)
                    most.append(len(inside))
                    turns.append(1)
                    inside.pop()
            except OwnedError:
                pass

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1


def elsewhere(path):
    """Write an owner on another machine; its last sign of life is now."""
    path.parent.mkdir(parents=True)
    there = replace(Owner.this_process(), host="elsewhere", machine="another")
    path.write_text(json.dumps(asdict(there)))


def test_an_owner_on_another_host_that_shows_signs_of_life_is_left_alone(locks, path, capfd):
    elsewhere(path)
    ended = threading.Event()

    def renew():
        while not ended.wait(0.02):
            os.utime(path)

    renewing = threading.Thread(target=renew)
    renewing.start()
    try:
        with pytest.raises(OwnedError, match="on elsewhere, since"), owned(path, "RUN"):
            pass
    finally:
        ended.set()
        renewing.join()
    assert "waiting at most 1" in capfd.readouterr().err


def test_an_owner_on_another_host_without_signs_of_life_is_dead_after_a_while(locks, path, monkeypatch):
    elsewhere(path)
    monkeypatch.setattr(owner, "PATIENCE", 0.3)
    with owned(path, "RUN"):
        assert Owner.read(path).pid == os.getpid()
    elsewhere(path.parent / "old" / "owner.json")
    monkeypatch.setattr(owner, "PATIENCE", 120.0)
    os.utime(path.parent / "old" / "owner.json", (time.time() - 130,) * 2)
    with owned(path.parent / "old" / "owner.json", "RUN"):
        pass


@pytest.mark.parametrize("lives", [False, True])
def test_the_lock_of_a_host_that_is_gone_is_waited_for(path, monkeypatch, holder, capfd, lives):
    """A file server holds it for a minute or more; a requeued job, or torchrun's restarts, would be over by then."""
    monkeypatch.setattr(owner, "RENEWAL", 0.1)
    monkeypatch.setattr(owner, "PATIENCE", 1.5)
    os.kill(holder.pid, signal.SIGCONT if lives else signal.SIGSTOP)  # it renews the file's time, or no longer
    there = replace(Owner.read(path), host="elsewhere", machine="another")
    monkeypatch.setattr(Owner, "read", lambda _: there)
    monkeypatch.setattr(owner.Path, "unlink", lambda *_, **__: None)
    if not lives:
        threading.Timer(0.5, holder.kill).start()  # the server frees the lock
    began = time.monotonic()
    if lives:
        with pytest.raises(OwnedError, match="on elsewhere, since"), owned(path, "RUN"):
            pass
        assert time.monotonic() - began < 1.5
    else:
        with owned(path, "RUN"):
            assert time.monotonic() - began > 0.4
    assert "is locked by process" in capfd.readouterr().err


def test_a_clock_that_was_set_back_makes_no_one_wait_longer(path, monkeypatch):
    """The last sign of life is a day ahead."""
    elsewhere(path)
    os.utime(path, (time.time() + 86_400,) * 2)
    now = itertools.count(0, 50)
    monkeypatch.setattr(owner.time, "monotonic", lambda: float(next(now)))
    monkeypatch.setattr(owner.time, "sleep", lambda _: None)
    with owned(path, "RUN"):
        assert Owner.read(path).pid == os.getpid()
    assert next(now) < 400


def test_an_owner_whose_file_was_deleted_owns_it_again(path, locks):
    with owned(path, "RUN"):
        said = path.read_text()
        path.unlink()
        deadline = time.monotonic() + 60
        while not path.is_file() or path.read_text() != said:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(OwnedError, match="is in use by"), owned(path, "RUN"):
            pass
    assert not path.exists()


def test_a_folder_that_went_away_is_noticed(path):
    assert not whereabouts(path)
    with owned(path, "RUN"):
        assert not whereabouts(path)
        path.unlink()
        assert not whereabouts(path), "the folder is there"
        path.touch()
        path.parent.rename(path.parent.with_name("other"))
        assert re.fullmatch(r"was (deleted or moved|moved to .*/other)", whereabouts(path))
        path.parent.mkdir()
        assert whereabouts(path), "another folder of its name is not it"


def test_a_link_to_what_is_not_there_is_called_one(tmp_path):
    """As one to a disk that is not mounted."""
    (tmp_path / "link").symlink_to(tmp_path / "absent")
    with (
        pytest.raises(NotADirectoryError, match="link links to what is not there"),
        owned(tmp_path / "link/run/o", "it"),
    ):
        pass


def test_of_two_without_locks_at_once_one_gives_way(path, monkeypatch):
    monkeypatch.setattr(owner.fcntl, "flock", no_locks)
    monkeypatch.setattr(owner.time, "sleep", lambda _: elsewhere(path.parent / "x" / "y") or path.write_text("{}"))
    with pytest.raises(OwnedError, match="in use by another process"), owned(path, "RUN"):
        pass


def test_who_was_taken_for_dead_ends_before_it_writes_again(path, holder):
    path.write_text(json.dumps(asdict(Owner.this_process())))
    assert holder.wait(60) == -signal.SIGKILL


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"host": 1}', b"\xff" * 20_000, b"[" * 9_000])
def test_a_file_of_no_owner_is_no_owner(path, content):
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with owned(path, "RUN"):
        assert Owner.read(path).pid == os.getpid()


def test_what_killed_processes_left_of_an_output_is_deleted_by_the_next(tmp_path):
    """Of tokenizing a corpus that is terabytes, in hidden folders."""
    for name in (".t.safetensors.ab_cdef1", ".t.safetensors.0hujcpug", ".page.html.zzzzzzzz"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "00000.safetensors").touch()
    others = [
        ".t.safetensors.mine",
        ".other.safetensors.0hujcpug",
        ".t.safetensors.0hujcpug.x",
        "t.safetensors.0hujcpug",
    ]
    for name in others:
        (tmp_path / name).mkdir()
    with TokenStoreWriter(tmp_path / "t.safetensors", 8, "abc") as writer:
        writer.append(np.array([1]), np.array([1]))
    with staged_outputs(tmp_path / "page.html") as (staged,):
        staged.touch()
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([*others, "page.html", "t.safetensors"])


def test_outputs_are_written_by_one_process(tmp_path):
    """Files, folders and token files; the first finishes undisturbed."""
    file, folder, tokens = tmp_path / "new" / "a.json", tmp_path / "folder", tmp_path / "t.safetensors"
    with staged_outputs(file, tmp_path / "new" / "b.json") as staged:
        for other in (file, tmp_path / "new" / "b.json"):
            with (
                pytest.raises(OwnedError, match=f"output {re.escape(str(other))}: is in use by"),
                staged_outputs(other),
            ):
                pass
        for path in staged:
            path.write_text("first")
    assert {path.name: path.read_text() for path in file.parent.iterdir()} == {"a.json": "first", "b.json": "first"}
    with new_folder(folder, "OUTPUT") as filled:
        (filled / "x").touch()
        with pytest.raises(OwnedError, match=r"OUTPUT .* is in use by"), new_folder(folder, "OUTPUT"):
            pass
        assert (filled / "x").exists()
    with TokenStoreWriter(tokens, 300, "abc") as writer:
        writer.append(np.arange(5), np.array([5]))
        with pytest.raises(OwnedError, match="is in use by"), TokenStoreWriter(tokens, 300, "abc"):
            pass
    assert TokenStore.open(tokens).num_tokens == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "new", "t.safetensors"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("owner"), train_characters=20_000)


def content(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("resume", ["auto", None])
def test_a_second_start_ends_with_a_status_of_its_own_and_touches_nothing(inputs, capfd, resume):
    run = inputs / "runs" / "owned"
    arguments = flags(inputs, name="owned", max_steps=1, no_compile=True, **({"resume": resume} if resume else {}))
    with owned(run / "owner.json", "RUN"):
        (run / "config.json").write_text('{"train": {}, "model": {}}')
        before = content(run)
        with pytest.raises(SystemExit) as end:
            run_command(TrainConfig, fit, arguments)
        assert end.value.code == 73
        (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        assert re.search(rf"--output_dir and --name: .*owned: is in use by process {os.getpid()} on ", line), line
        assert content(run) == before
        write_report(run)  # who reads is not kept from it
    (run / "report.html").unlink()


def test_all_ranks_of_a_second_start_end_alike(inputs):
    run = inputs / "runs" / "ranks"
    with owned(run / "owner.json", "RUN"):
        ranks = forked_ranks(2, _second_start, flags(inputs, name="ranks", max_steps=1, no_compile=True))
        for rank in ranks:
            rank.join(120)
        assert [rank.exitcode for rank in ranks] == [73, 73]
    assert not run.exists()


def _second_start(arguments):
    run_command(TrainConfig, fit, arguments)


@pytest.mark.parametrize("action", ["move", "delete"])
def test_a_run_whose_folder_went_away_ends_with_one_line(inputs, monkeypatch, capfd, action):
    run, there = inputs / "runs" / action, inputs / "runs" / f"{action}d"

    def go(trainer):
        if trainer.step == 3:
            run.rename(there)
            if action == "delete":
                shutil.rmtree(there)

    train_step = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda self, rows: go(self) or train_step(self, rows))
    with pytest.raises(SystemExit) as end:
        run_command(TrainConfig, fit, flags(inputs, name=action, max_steps=9, save_every=2, no_compile=True))
    assert end.value.code == 1
    line = capfd.readouterr().err.splitlines()[-1]
    what = f"moved to {there}" if action == "move" and sys.platform == "linux" else "deleted or moved"
    assert f"error: --output_dir and --name: {run} was {what} while the run was going" in line
    assert not run.exists(), "nothing is written in its place"
    assert action == "delete" or [path.name for path in list_checkpoints(there)] == ["step_00000002"]
