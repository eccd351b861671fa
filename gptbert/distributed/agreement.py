"""What must be the same on every rank, compared before anything relies on it."""

from collections.abc import Mapping

from gptbert.distributed.world import World
from gptbert.errors import SharedError, listed


def check_same(values: Mapping[str, object], world: World) -> None:
    """Refuse what differs between ranks; every rank must call it, outside of `World.errors_on_all_ranks`.

    Args:
        values: small and picklable, each by what to say where it differs; as many on every rank, in the same order.
        world: the ranks.

    Raises:
        SharedError: on every rank: what to say of the first that differs, and the ranks that are unlike the main one.
    """
    everyone = world.all_gather(list(values.values()))
    for index, message in enumerate(values):
        others = [str(rank) for rank, theirs in enumerate(everyone) if theirs[index] != everyone[0][index]]
        if others:
            raise SharedError(f"{message} (unlike rank 0: rank {listed(others, 8)})")
