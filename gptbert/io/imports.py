"""The imports of a command: without garbage collections, and with one line where the environment is in their way."""

import gc
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from gptbert.errors import first_line

_PREFIXES = ("TORCH", "PYTORCH_", "TQDM_", "TRITON_")  # of variables that libraries read while they are imported


@contextmanager
def explained() -> Iterator[None]:
    """Context manager: a variable of the environment that a library cannot read ends the process with one line."""
    try:
        yield
    except ValueError as error:
        read = {name: value for name, value in os.environ.items() if name.startswith(_PREFIXES)}
        words = re.findall(r"\w+|''", str(error))
        wrong = [name for name, value in read.items() if {name, value or "''"} & set(words)]
        if not wrong:
            raise
        named = ", ".join(f"{name} is {read[name][:100]!r}" for name in wrong)
        print(f"error: {named}: {first_line(error)}; unset it for the default", file=sys.stderr)
        sys.exit(1)


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
