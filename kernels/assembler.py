"""The assembler of Triton's kernels on NVIDIA GPUs: not a release that is known to make wrong code."""

import importlib
import os
from pathlib import Path

# ptxas 12.8 loses a descriptor of a Hopper matrix product where registers are scarce: an illegal memory access, seen on
# an H200 with Triton 3.6. Later releases, on the same PTX, do not. Triton's wheels have one of those, for Blackwell.
_WRONG = ("12.8",)
_VARIABLE = "TRITON_PTXAS_PATH"


def choose_assembler() -> None:
    """Make Triton use its assembler for Blackwell if the other one is wrong; call it before anything is compiled.

    An assembler named in the environment is left alone.
    """
    own, later = _tool("ptxas"), _tool("ptxas_blackwell")
    if _VARIABLE in os.environ or own is None or later is None:
        return
    if own[1].startswith(_WRONG) and not later[1].startswith(_WRONG):
        os.environ[_VARIABLE] = str(later[0])


def assembler_version() -> str | None:
    """The release that assembles for GPUs up to Hopper, such as "12.9"; None without Triton or its NVIDIA backend."""
    tool = _tool("ptxas")
    return None if tool is None else tool[1]


def _tool(name: str) -> tuple[Path, str] | None:
    """Path and release of an assembler that Triton knows."""
    try:
        tool = getattr(importlib.import_module("triton.knobs").nvidia, name)
        return Path(tool.path), str(tool.version)
    except (ImportError, AttributeError, RuntimeError, OSError):
        return None
