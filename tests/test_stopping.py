"""A signal in any phase of a run: what is trained is saved at once, and the run goes on as if nothing had happened.

The phases send the signal themselves, so that nothing depends on the machine's speed.
"""

import contextlib
import os
import shutil
import signal
import sys
import threading

import pytest

from gptbert import trainer
from gptbert.checkpoint.folder import list_checkpoints
from gptbert.checkpoint.word_checkpoints import WordCheckpoints
from gptbert.command_line import parse, run_command
from gptbert.config import TrainConfig
from gptbert.data.inputs import Inputs
from gptbert.data.loader import BatchLoader
from gptbert.data.prefetcher import Prefetcher
from gptbert.data.token_store import TokenStore
from gptbert.distributed.stop_signal import SIGNALS, StopSignal
from gptbert.errors import StoppedError
from gptbert.monitoring.records import read_records
from gptbert.monitoring.samples import Samples
from gptbert.monitoring.trackers import Trackers
from gptbert.monitoring.validation import Validation
from gptbert.train import fit
from gptbert.trainer import Trainer
from tests.runs import assert_same_end, flags, on_ranks, train, write_inputs

SETTINGS = {
    "no_compile": True, "max_steps": 12, "save_every": 4, "validate_every": 6, "validation_steps": 2, "resume": "auto",
    "checkpoint_words": [300],
}  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("stopping"))


@pytest.fixture(scope="module")
def undisturbed(inputs):
    run(inputs, "undisturbed")
    return inputs / "runs" / "undisturbed"


def run(inputs, name, **changes):
    fit(parse(TrainConfig, flags(inputs, name=name, **SETTINGS | changes)))


def send(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


def steps_of(run_dir):
    return [int(path.name.removeprefix("step_")) for path in list_checkpoints(run_dir)]


def validated(run_dir):
    return [record["step"] for record in read_records(run_dir / "metrics.jsonl") if "validation/mlm/loss" in record]


BATCHES = 4  # of a model: --validation_steps 2 of 16 rows, --local_batch_size 8


@pytest.mark.parametrize(
    ("number", "step", "at"),
    [(signal.SIGTERM, 6, 2), (signal.SIGUSR1, 12, BATCHES + 1), (signal.SIGINT, 6, 2 * BATCHES)],
)
def test_in_a_validation_the_run_ends_after_that_batch(inputs, undisturbed, monkeypatch, number, step, at):
    """At step 6 no checkpoint is due, at step 12 it is."""
    name = f"validation {step} {at}"
    make_batches, validate, here, batches = Validation._batches, Trainer.validate, [], []

    def watched(self, first, count):
        if here == [step]:
            batches.append(first)
            if len(batches) == at:
                send(number)
        return make_batches(self, first, count)

    def noted(self, *others):
        here[:] = [self.step]
        validate(self, *others)

    with monkeypatch.context() as patch:
        patch.setattr(Validation, "_batches", watched)
        patch.setattr(Trainer, "validate", noted)
        with pytest.raises(StoppedError, match=f"stopped by {number.name} after step {step}, with a checkpoint in"):
            run(inputs, name)
    assert len(batches) == at, "none after the one in which the signal came"
    run_dir = inputs / "runs" / name
    assert steps_of(run_dir)[-1] == step
    assert validated(run_dir) == ([6] if step == 12 else [])
    run(inputs, name)
    assert_same_end(run_dir, undisturbed)
    assert validated(run_dir) == [6, 12]


@pytest.mark.parametrize(
    ("of", "method", "saved"),
    [(Samples, "__call__", 6), (WordCheckpoints, "save", 5), (Trainer, "save", 4), (Trainer, "train_step", 1)],
)
def test_in_other_work_the_run_ends_with_a_checkpoint(inputs, undisturbed, monkeypatch, of, method, saved):
    name, work, sent = f"in {of.__name__}.{method}", getattr(of, method), []

    def interrupted(self, *others):
        if not sent:
            sent.append(send())
        return work(self, *others)

    with monkeypatch.context() as patch:
        patch.setattr(of, method, interrupted)
        with pytest.raises(StoppedError):
            run(inputs, name)
    run_dir = inputs / "runs" / name
    assert steps_of(run_dir)[-1] == saved
    run(inputs, name)
    assert_same_end(run_dir, undisturbed)


class Gone:
    """A screen whose reader has ended, as a `tee` after Ctrl-C, or a terminal that was closed."""

    lines = 0

    def write(self, _text=""):
        self.lines += 1
        raise BrokenPipeError

    flush = write

    def isatty(self):
        return False


def test_without_a_screen_the_run_saves_and_goes_on(inputs, undisturbed, monkeypatch):
    train_step, sent = Trainer.train_step, []

    def interrupted(self, rows):
        if self.step == 5 and not sent:
            sent.append(send(signal.SIGHUP))
        return train_step(self, rows)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    handler = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        for status in (75, 0):
            monkeypatch.setattr(sys, "stderr", Gone())
            with pytest.raises(SystemExit) if status else contextlib.nullcontext() as end:
                run_command(TrainConfig, fit, flags(inputs, name="gone", **SETTINGS))
            assert sys.stderr.lines > 3
            if status:
                assert end.value.code == status
                assert steps_of(inputs / "runs" / "gone")[-1] == 6
    finally:
        signal.signal(signal.SIGHUP, handler)
    assert_same_end(inputs / "runs" / "gone", undisturbed)


def stalling(end):
    """`BatchLoader.load` that sends a signal at step 5, once its rows are waited for, and then waits for `end`.

    Returns it and a `Prefetcher.get` that tells it.
    """
    load, get, is_asked = BatchLoader.load, Prefetcher.get, threading.Event()

    def stuck(self, step):
        if step == 5:
            is_asked.wait()
            send()
            end.wait()
        return load(self, step)

    def asking(self, step, *others):
        if step == 5:
            is_asked.set()
        return get(self, step, *others)

    return stuck, asking


def test_while_rows_are_waited_for(inputs, undisturbed, monkeypatch):
    """The disk never answers: the steps before are saved, and the process is not kept from ending."""
    never = threading.Event()
    stuck, asking = stalling(never)
    with monkeypatch.context() as patch:
        patch.setattr(BatchLoader, "load", stuck)
        patch.setattr(Prefetcher, "get", asking)
        with pytest.raises(StoppedError, match="stopped by SIGTERM after step 5"):
            run(inputs, "rows")
    assert steps_of(inputs / "runs" / "rows")[-1] == 5
    never.set()
    run(inputs, "rows")
    assert_same_end(inputs / "runs" / "rows", undisturbed)


def test_rows_that_never_come_at_the_first_step(inputs, monkeypatch):
    monkeypatch.setattr(BatchLoader, "load", lambda self, step: send() or threading.Event().wait())
    with pytest.raises(KeyboardInterrupt):
        run(inputs, "no rows")
    assert steps_of(inputs / "runs" / "no rows") == []


@pytest.mark.parametrize(
    ("number", "phase"),
    [
        (signal.SIGTERM, "gptbert.data.inputs.Inputs.open"),
        (signal.SIGUSR1, "gptbert.data.token_store.TokenStore._check"),
        (signal.SIGINT, "gptbert.train.find_for_all_ranks"),
        (signal.SIGUSR1, "gptbert.trainer.Trainer._warm_up"),
        (signal.SIGTERM, "gptbert.trainer.Trackers"),
    ],
)
def test_before_the_first_step_the_run_ends_at_once(inputs, monkeypatch, capfd, number, phase):
    """Reading files, checking token ids, compiling, looking for checkpoints, starting wandb."""
    handlers = [signal.getsignal(each) for each in SIGNALS]
    monkeypatch.setattr(phase, lambda *args, **options: send(number) or pytest.fail("went on"))
    try:
        with pytest.raises(SystemExit) as end:
            run_command(TrainConfig, fit, flags(inputs, name="early", **SETTINGS))
    finally:
        for each, handler in zip(SIGNALS, handlers, strict=True):
            signal.signal(each, handler)
    assert end.value.code == 130
    assert capfd.readouterr().err.splitlines()[-1] == "error: interrupted"
    assert not list_checkpoints(inputs / "runs" / "early")


def test_token_ids_are_checked_in_pieces(inputs, monkeypatch):
    """A handler runs between pieces, however slow the disk is."""
    pieces = []
    monkeypatch.setattr("gptbert.data.token_store.SLICE", 1000)
    monkeypatch.setattr(TokenStore, "_check", lambda self, tokens, positions: pieces.append(len(tokens)))
    config = parse(TrainConfig, flags(inputs))
    opened = Inputs.open(config)
    opened.check_ids(0, 1)
    assert max(pieces) <= 1000
    assert sum(pieces) == opened.num_train_tokens + opened.valid_store.num_tokens


class Killed(BaseException):
    pass


@pytest.mark.parametrize(("step", "moment"), [(6, "in the validation"), (12, "before the record")])
def test_a_validation_that_a_kill_ended_is_made_up(inputs, undisturbed, monkeypatch, step, moment):
    name = f"killed {step} {moment}"

    def die(self, at, *others):
        if at == step:
            raise Killed

    with monkeypatch.context() as patch:
        if moment == "before the record":
            inner = Trackers.log
            patch.setattr(
                Trackers,
                "log",
                lambda self, at, values: (
                    die(self, at if "validation/mlm/loss" in values else 0) or inner(self, at, values)
                ),
            )
        else:
            record = Trainer.validation_record
            patch.setattr(
                Trainer, "validation_record", lambda self, advance: die(self, self.step) or record(self, advance)
            )
        with pytest.raises(Killed):
            run(inputs, name, save_every=6)
    run_dir = inputs / "runs" / name
    assert steps_of(run_dir)[-1] == step
    assert step not in validated(run_dir)
    run(inputs, name, save_every=6)
    assert_same_end(run_dir, undisturbed)
    run(inputs, name, save_every=6)
    assert validated(run_dir) == [6, 12], "and done once"


def test_it_is_made_up_where_checkpoints_lie_behind_a_link(inputs, undisturbed, tmp_path):
    run_dir = inputs / "runs" / "linked"
    shutil.copytree(undisturbed, run_dir)
    (run_dir / "checkpoints").rename(tmp_path / "on another disk")
    (run_dir / "checkpoints").symlink_to(tmp_path / "on another disk")
    metrics = run_dir / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:-1]))
    assert validated(run_dir) == [6]
    run(inputs, "linked")
    assert_same_end(run_dir, undisturbed)


def stopped_rank(rank, arguments, results):
    """Trains; rank 1 gets a signal in its second batch of the first validation."""
    make_batches, count = Validation._batches, []

    def watched(self, first, rows):
        count.append(first)
        if rank == 1 and len(count) == 2:
            send(signal.SIGUSR1)
        return make_batches(self, first, rows)

    Validation._batches = watched
    try:
        fit(parse(TrainConfig, arguments))
        results.put((rank, ("went on", len(count))))
    except StoppedError as stop:
        results.put((rank, (str(stop), len(count))))


def test_all_ranks_leave_a_validation_together(inputs):
    """Sharded: each forward gathers weights from all ranks, so that one more or less would hang."""
    settings = {**SETTINGS, "parallel": "fsdp", "hybrid_mode": "batch", "max_steps": 8}
    train(inputs, "ranks-whole", 2, **settings)
    said = on_ranks(2, stopped_rank, flags(inputs, name="ranks-stopped", **settings))
    assert {count for _, count in said.values()} == {2}
    assert "stopped by a signal to another process after step 6" in said[0][0]
    assert "stopped by SIGUSR1 after step 6" in said[1][0]
    assert steps_of(inputs / "runs" / "ranks-stopped")[-1] == 6
    train(inputs, "ranks-stopped", 2, **settings)
    assert_same_end(*(inputs / "runs" / f"ranks-{which}" for which in ("whole", "stopped")))


def stalled_rank(rank, arguments, as_on_gpus, results):
    """Trains; rank 1's rows of step 5 never come, and all ranks get a signal once the others wait for it."""
    if as_on_gpus:
        StopSignal.stops_before_steps = False
    never = threading.Event()
    if rank == 0:
        never.set()
    stuck, asking = stalling(never)
    BatchLoader.load, Prefetcher.get, logged = stuck, asking, []
    trainer.log = logged.append
    try:
        fit(parse(TrainConfig, arguments))
        results.put((rank, ["went on"]))
    except StoppedError as stop:
        results.put((rank, [str(stop), *logged]))


def test_a_rank_that_waits_for_rows_tells_the_others(inputs):
    settings = {**SETTINGS, "mask_history": True, "max_steps": 8}
    train(inputs, "rows-whole", 2, **settings)
    said = on_ranks(2, stalled_rank, flags(inputs, name="rows-stopped", **settings), False)
    assert all("stopped by SIGTERM after step 5" in line for line, *_ in said.values())
    assert steps_of(inputs / "runs" / "rows-stopped")[-1] == 5
    train(inputs, "rows-stopped", 2, **settings)
    assert_same_end(*(inputs / "runs" / f"rows-{which}" for which in ("whole", "stopped")))


@pytest.mark.parametrize("mode", ["rank", "batch"])
def test_where_it_cannot_tell_them_it_takes_the_step_without_rows(inputs, mode):
    """As on several GPUs, here on CPUs; the run goes on from there, without these rows."""
    name = f"rows-left-out-{mode}"
    settings = {**SETTINGS, "mask_history": True, "max_steps": 8, "hybrid_mode": mode, "hybrid_denominator": 2}
    said = on_ranks(2, stalled_rank, flags(inputs, name=name, **settings), True)
    assert all("stopped by SIGTERM after step 6" in line for line, *_ in said.values())
    line = "rank 1: its rows of step 6 did not come; the step is taken without them"
    assert [line in lines for lines in said.values()] == [rank == 1 for rank in said]
    assert steps_of(inputs / "runs" / name)[-1] == 6
    records = train(inputs, name, 2, **settings)
    assert records[-1]["step"] == 8
