"""The assembler (ptxas) of Triton kernels with matrix products: no release that is known to make wrong code of them."""

import functools
import importlib
import os

# ptxas 12.8 loses a descriptor of a Hopper matrix product where registers are scarce: an illegal memory access, seen on
# an H200 with Triton 3.6. Later releases, on the same PTX, do not. Triton's wheels have one of those, for Blackwell.
_WRONG = ("12.8",)
_VARIABLE = "TRITON_PTXAS_PATH"


@functools.cache
def use_right_assembler() -> str | None:
    """Choose Triton's later assembler for this process if its first is known to be wrong; call before any compilation.

    The choice is the whole process's: threads compile side by side, and a kernel's key in Triton's cache names the
    release that the process used first. An assembler named in the environment is left alone.

    Returns:
        The release for GPUs up to Hopper, such as "12.9"; None without Triton or its NVIDIA backend.
    """
    first = _release_of("ptxas")
    if os.environ.get(_VARIABLE) or is_right(first):
        return first
    later = _release_of("ptxas_blackwell")
    if later is None or not is_right(later):
        return first
    os.environ[_VARIABLE] = importlib.import_module("triton.knobs").nvidia.ptxas_blackwell.path
    return later


def is_right(release: str | None) -> bool:
    """Whether a release of ptxas is not known to make wrong code; None is no assembler of NVIDIA's."""
    return release is None or not release.startswith(_WRONG)


def _release_of(name: str) -> str | None:
    try:
        return str(getattr(importlib.import_module("triton.knobs").nvidia, name).version)
    except (ImportError, AttributeError, RuntimeError, OSError):
        return None
