"""A store of its own for each start of a run's processes, where torchrun gives all starts the same one.

torchrun's agent keeps one key-value store while `--max_restarts` starts the processes again, and what they put there
before, addresses for example, is then found by their successors (pytorch/pytorch issue 135712; so in torch 2.13).
"""

import os
import secrets
import time
from datetime import timedelta

import torch.distributed as dist

_PATIENCE = timedelta(seconds=1)  # before looking whether rank 0 has begun anew


def shares_its_store() -> bool:
    """Whether earlier starts of this process may have left something in the store."""
    return (
        os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ.get("TORCHELASTIC_MAX_RESTARTS") != "0"
    )


def fresh_store(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """A part of the store that all ranks of this start use, and none of an earlier one did.

    Rank 0 opens a part with a name of its own; the others find the name, and take it once they are welcomed there under
    names of their own, which nobody can have been before.

    Args:
        store: of all starts.
        rank: of this process.
        world_size: number of processes.
        timeout: how long to wait for all of them.

    Raises:
        torch.distributed.DistStoreError: they did not come.
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
