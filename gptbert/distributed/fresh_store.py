"""A separate store for each start of a run's processes, because torchrun gives all starts the same one.

torchrun's agent keeps one key-value store across the restarts of `--max_restarts`, so restarted processes find stale
keys of their predecessors, such as addresses (pytorch/pytorch issue 135712; still so in torch 2.13).
"""

import os
import secrets
import time
from datetime import timedelta

import torch.distributed as dist

_PATIENCE = timedelta(seconds=1)  # between checks for a newer name from rank 0


def shares_its_store() -> bool:
    """Whether earlier starts of this process may have left keys in the store."""
    return (
        os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ.get("TORCHELASTIC_MAX_RESTARTS") != "0"
    )


def fresh_store(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """A namespace of the store, shared by all ranks of this start and used by no earlier one.

    Rank 0 publishes a unique namespace; each other rank announces itself there under a unique name, and uses the
    namespace once rank 0 has acknowledged that name, which a stale namespace cannot contain.

    Args:
        store: shared by all starts.
        rank: of this process.
        world_size: number of processes.
        timeout: how long to wait for all of them.

    Raises:
        torch.distributed.DistStoreError: a rank did not join in time.
    """
    own = secrets.token_hex(8)
    if rank == 0:
        store.set("newest start", own)
        part = dist.PrefixStore(own, store)
        for other in range(1, world_size):
            part.wait([f"rank {other}"], timeout)
            part.set(f"welcome {part.get(f'rank {other}').decode()}", "")
        return part
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        store.wait(["newest start"], timeout)
        part = dist.PrefixStore(store.get("newest start").decode(), store)
        part.set(f"rank {rank}", own)
        try:
            part.wait([f"welcome {own}"], _PATIENCE)
        except dist.DistStoreError:
            if time.monotonic() > deadline:
                raise
        else:
            return part
