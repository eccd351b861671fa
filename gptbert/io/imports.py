"""The imports of a command, without garbage collections."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Context manager: no garbage is collected, and later collections leave out what is there at the end.

    Modules stay, but Python looks through all of their objects after every few thousand new ones: a fifth of the time
    in which a run starts.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
