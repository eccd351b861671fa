"""Launches that share a store must not read each other's keys."""

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from gptbert.distributed.fresh_store import fresh_store, shares_its_store

TIMEOUT = timedelta(seconds=20)


def join(store, ranks, world_size):
    """Join ranks of one launch in threads; returns each rank's part of the store, and the threads."""
    parts = {}

    def join_as(rank):
        parts[rank] = fresh_store(store, rank, world_size, TIMEOUT)

    threads = [threading.Thread(target=join_as, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    return parts, threads


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_each_start_has_a_part_of_its_own(order):
    """Even if later ranks arrive first and find keys of the previous launch."""
    store = dist.HashStore()
    for start in range(3):
        parts, threads = join(store, order, 3)
        for thread in threads:
            thread.join(20)
        assert sorted(parts) == [0, 1, 2]
        assert not parts[0].check(["address"]), "of the start before"
        parts[0].set("address", str(start))
        assert {part.get("address").decode() for part in parts.values()} == {str(start)}


def test_ranks_that_die_on_the_way_leave_nothing_behind():
    """An incomplete launch without rank 1, then a complete one: ranks waiting for the first join the second."""
    store = dist.HashStore()
    with pytest.raises(dist.DistStoreError):
        fresh_store(store, 0, 3, timedelta(seconds=0.2))
    parts, early = join(store, (2,), 3)
    others, late = join(store, (0, 1), 3)
    for thread in early + late:
        thread.join(20)
    parts |= others
    parts[0].set("address", "new")
    assert [parts[rank].get("address") for rank in range(3)] == [b"new"] * 3


def test_a_rank_without_others_gives_up():
    store = dist.HashStore()
    with pytest.raises(dist.DistStoreError):
        fresh_store(store, 1, 2, timedelta(seconds=0.2))
    store.set("newest start", "of long ago")
    with pytest.raises(dist.DistStoreError):
        fresh_store(store, 1, 2, timedelta(seconds=0.2))


@pytest.mark.parametrize(
    ("variables", "shares"),
    [
        ({}, False),
        ({"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "3"}, True),
        ({"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "0"}, False),
        ({"TORCHELASTIC_USE_AGENT_STORE": "False", "TORCHELASTIC_MAX_RESTARTS": "3"}, False),
    ],
)
def test_only_restarts_share_a_store(monkeypatch, variables, shares):
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_MAX_RESTARTS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert shares_its_store() == shares
