"""A run over two hosts ends like one on a single host, even if the link or a host fails and comes back."""

import re
import time

import pytest

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


def end(hosts, processes, logs, seconds):
    """Exit statuses and output of both hosts; every process must have ended after this many seconds."""
    deadline = time.monotonic() + seconds
    while hosts.process_ids() and time.monotonic() < deadline:
        time.sleep(0.2)
    said = [(logs / f"{index}.log").read_text() for index in range(len(processes))]
    assert not hosts.process_ids(), said
    return [process.wait() for process in processes], said


def test_a_run_survives_a_host_that_fails_and_a_lost_link(hosts, inputs, undisturbed):
    """A host that is started again is waited for; a lost link ends every process; the same command then goes on.

    At the end nothing differs from the run on a single host.
    """
    run, logs = inputs / "runs" / "hosts", inputs / "hosts"
    arguments = flags(inputs, name="hosts", **SETTINGS)
    first, _ = hosts.start(arguments, logs, restarts=1)
    wait_for_record(first, run, SETTINGS["max_steps"] // 4)
    hosts.kill(1)
    records = read_records(run / "metrics.jsonl")
    assert records[-1]["step"] < SETTINGS["max_steps"], "killed too late to show anything"
    second = hosts.start_one(1, arguments, logs)
    wait_for_record(first, run, len(records) + 3)
    hosts.set_link("down")
    statuses, said = end(hosts, [first, second], logs, TIMEOUT + MARGIN)
    assert all(statuses), said
    assert "going on from" in said[0], "the first host never ended"
    since = [text.rpartition("going on from")[2] for text in said]  # not the lines about the host that failed
    lines = [re.findall(r"error: rank (\d): another process .*--timeout 15 s", text) for text in since]
    assert [sorted(ranks) for ranks in lines] == [["0", "1"], ["2", "3"]], said
    assert read_records(run / "metrics.jsonl")[-1]["step"] < SETTINGS["max_steps"], "cut too late to show anything"

    hosts.set_link("up")
    statuses, said = end(hosts, hosts.start(arguments, logs), logs, 300)
    assert statuses == [0, 0], said
    assert "going on from" in said[0]
    assert_same_end(run, undisturbed)
