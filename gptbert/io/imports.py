"""The imports of a command: without garbage collections, and with one line where the environment is in their way."""

import gc
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from gptbert.errors import first_line

_OWN = {"gptbert", "kernels", "tokenize_scripts", "benchmarks"}  # packages of ours; others are to be installed
_PREFIXES = ("TORCH", "PYTORCH_", "TQDM_", "TRITON_")  # of variables that libraries read while they are imported


@contextmanager
def explained() -> Iterator[None]:
    """Context manager: an environment that is in the way of imports ends the process with one line.

    It lacks a library, as another Python than that of .venv does, or has a variable that a library cannot read.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or "." in error.name or error.name in _OWN:
            raise  # a part of a package that is there
        print(f"error: {error.name} is not installed; make install, or source .venv/bin/activate", file=sys.stderr)
        sys.exit(1)
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
