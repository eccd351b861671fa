"""Stop signals: remembered, agreed on by all ranks, and handlers restored afterwards."""

import errno
import os
import signal
import threading

import pytest
import torch

from gptbert.distributed.stop_signal import SIGNALS, StopSignal
from gptbert.distributed.world import World

CPU = torch.device("cpu")


def should_stop(stop, total):
    """The decision at the end of a step, given the sum of stop requests over ranks."""
    stop.note(total)
    return stop.should_stop()


@pytest.fixture(autouse=True)
def terminal():
    """SIGHUP as on a terminal, also where these tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_remembered_and_the_old_handlers_come_back(number, capfd):
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopSignal(World(0, 1, CPU)) as stop:
        assert stop.received is None
        assert not should_stop(stop, stop.requests())
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received is number
        assert stop.received_name == number.name
        assert should_stop(stop, stop.requests())
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert capfd.readouterr().err.count("saving a checkpoint") == 1


def test_a_second_ctrl_c_interrupts_at_once():
    with StopSignal(World(0, 1, CPU)):
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_one_rank_among_several_is_enough(capfd):
    ranks = [StopSignal(World(rank, 3, CPU)) for rank in range(3)]
    assert not any(should_stop(rank, sum(rank.requests() for rank in ranks)) for rank in ranks)
    with ranks[1]:
        os.kill(os.getpid(), signal.SIGUSR1)
    total = sum(rank.requests() for rank in ranks)
    assert all(should_stop(rank, total) for rank in ranks)
    other = "a signal to another process"
    assert [rank.received_name for rank in ranks] == [other, "SIGUSR1", other]
    assert capfd.readouterr().err == "", "only the first rank speaks"


def test_on_another_thread_signals_are_left_alone():
    before = [signal.getsignal(number) for number in SIGNALS]
    seen = []

    def enter():
        with StopSignal(World(0, 1, CPU)) as stop:
            seen.append((stop.received, [signal.getsignal(number) for number in SIGNALS] == before))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [(None, True)]


def test_a_hangup_that_nohup_has_a_run_ignore_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignal(World(0, 1, CPU)) as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.received is None
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_a_screen_that_is_gone_does_not_matter(monkeypatch):
    monkeypatch.setattr(os, "write", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "gone")))
    with StopSignal(World(0, 1, CPU)) as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.received is signal.SIGHUP
