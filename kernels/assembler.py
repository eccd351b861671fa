"""The assembler of Triton kernels with matrix products: not a release that is known to make wrong code of them."""

import functools
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager

# ptxas 12.8 loses a descriptor of a Hopper matrix product where registers are scarce: an illegal memory access, seen on
# an H200 with Triton 3.6. Later releases, on the same PTX, do not. Triton's wheels have one of those, for Blackwell.
_WRONG = ("12.8",)
_VARIABLE = "TRITON_PTXAS_PATH"


@contextmanager
def right_assembler() -> Iterator[str | None]:
    """Context manager: kernels compiled in the block are assembled by Triton's later assembler if its first is wrong.

    Around launches, the first of which compiles. An assembler named in the environment is left alone.

    Yields:
        The release for GPUs up to Hopper, such as "12.9"; None without Triton or its NVIDIA backend.
    """
    if os.environ.get(_VARIABLE):
        yield _release_of("ptxas")
        return
    path, release = _choice()
    try:
        if path is not None:
            os.environ[_VARIABLE] = path
        yield release
    finally:
        os.environ.pop(_VARIABLE, None)


def is_right(release: str | None) -> bool:
    """Whether a release of ptxas is not known to make wrong code; None is no assembler of NVIDIA's."""
    return release is None or not release.startswith(_WRONG)


@functools.cache
def _choice() -> tuple[str | None, str | None]:
    """Path of the assembler to use instead of Triton's first, or None; and the release that is used."""
    first, later = _release_of("ptxas"), _release_of("ptxas_blackwell")
    if is_right(first) or later is None or not is_right(later):
        return None, first
    return importlib.import_module("triton.knobs").nvidia.ptxas_blackwell.path, later


def _release_of(name: str) -> str | None:
    try:
        return str(getattr(importlib.import_module("triton.knobs").nvidia, name).version)
    except (ImportError, AttributeError, RuntimeError, OSError):
        return None
