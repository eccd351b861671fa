"""A run over two hosts ends like one on a single host, even if the link or a host fails and comes back."""

import re
import time

import pytest

from gptbert.checkpoint.folder import list_checkpoints
from gptbert.monitoring.records import read_records
from tests.hosts import two_hosts
from tests.runs import assert_same_end, flags, train, wait_for_record, write_inputs

TIMEOUT = 15  # seconds; more than four processes on two busy cores delay each other
MARGIN = 45  # seconds until torchrun has noticed too
SETTINGS = {
    "hybrid_mode": "rank",
    "hybrid_denominator": 4,
    "mixed_precision": True,  # as in the recipe
    "max_steps": 40,
    "save_every": 5,
    "timeout": TIMEOUT,
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("hosts"))


@pytest.fixture(scope="module")
def hosts():
    with two_hosts() as hosts:
        yield hosts


@pytest.fixture(scope="module")
def undisturbed(hosts, inputs):
    """Folder of a four-process run on one host; depends on `hosts` so that it is skipped with them."""
    train(inputs, "one-host", 4, **SETTINGS)
    return inputs / "runs" / "one-host"


def start(hosts, inputs, name):
    return hosts.start(flags(inputs, name=name, **SETTINGS), inputs / name)


def end(hosts, processes, logs, seconds):
    """Exit statuses and output of both hosts; every process must have ended after this many seconds."""
    deadline = time.monotonic() + seconds
    while hosts.process_ids() and time.monotonic() < deadline:
        time.sleep(0.2)
    said = [(logs / f"{index}.log").read_text() for index in range(len(processes))]
    assert not hosts.process_ids(), said
    return [process.wait() for process in processes], said


def test_two_hosts_train_as_one(hosts, inputs, undisturbed):
    statuses, said = end(hosts, start(hosts, inputs, "two-hosts"), inputs / "two-hosts", 300)
    assert statuses == [0, 0], said
    assert_same_end(inputs / "runs" / "two-hosts", undisturbed)


def test_a_lost_link_ends_every_process_and_the_run_goes_on_later(hosts, inputs, undisturbed):
    run = inputs / "runs" / "cut"
    processes = start(hosts, inputs, "cut")
    wait_for_record(processes[0], run, SETTINGS["max_steps"] // 4)
    hosts.set_link("down")
    statuses, said = end(hosts, processes, inputs / "cut", TIMEOUT + MARGIN)
    assert all(statuses), said
    lines = [re.findall(r"error: rank (\d): another process .*--timeout 15 s", text) for text in said]
    assert [sorted(ranks) for ranks in lines] == [["0", "1"], ["2", "3"]], said
    assert list_checkpoints(run), "cut too early to go on from anything"
    assert read_records(run / "metrics.jsonl")[-1]["step"] < SETTINGS["max_steps"], "cut too late to show anything"
    hosts.set_link("up")
    statuses, said = end(hosts, start(hosts, inputs, "cut"), inputs / "cut", 300)
    assert statuses == [0, 0], said
    assert "going on from" in said[0]
    assert_same_end(run, undisturbed)


def test_a_host_that_fails_and_is_started_again_is_waited_for(hosts, inputs, undisturbed):
    run = inputs / "runs" / "back"
    arguments = flags(inputs, name="back", **SETTINGS)
    first, _ = hosts.start(arguments, inputs / "back", restarts=1)
    wait_for_record(first, run, SETTINGS["max_steps"] // 4)
    hosts.kill(1)
    assert read_records(run / "metrics.jsonl")[-1]["step"] < SETTINGS["max_steps"], "killed too late to show anything"
    second = hosts.start_one(1, arguments, inputs / "back", restarts=1)
    statuses, said = end(hosts, [first, second], inputs / "back", 300)
    assert statuses == [0, 0], said
    assert "going on from" in said[0], "the first host never ended"
    assert_same_end(run, undisturbed)
