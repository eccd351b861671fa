"""Which implementation of an operation runs: Triton on a GPU, PyTorch elsewhere, unless somebody says otherwise."""

import importlib.util
import os

import torch

BACKENDS = ("torch", "triton")

_TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None  # PyTorch 2.11 does not trace a look for it

_default: str | None = None


def choose_backend(backend: str | None, device: torch.device) -> str:
    """Resolve an operation's `backend` argument.

    The first of these that is given decides: the argument, `set_default_backend`, the environment's `KERNELS_BACKEND`,
    and last the device: "triton" on a GPU where Triton is installed, "torch" elsewhere.

    Args:
        backend: a name from `BACKENDS`, or None.
        device: where the tensors lie.

    Raises:
        ValueError: the name is not a backend, Triton is not installed, or it cannot run on `device`.
    """
    named = {"backend": backend, **_process_wide()}
    source, chosen = next(((source, name) for source, name in named.items() if name), (None, None))
    if chosen is None:
        return "triton" if device.type == "cuda" and _TRITON_IS_INSTALLED else "torch"
    if chosen not in BACKENDS:
        raise ValueError(f"{source}={chosen!r}: this version has {', '.join(BACKENDS)}")
    if chosen == "triton" and not _TRITON_IS_INSTALLED:
        raise ValueError(f"{source}='triton': Triton is not installed (pip install triton, Linux only); 'torch' works")
    if chosen == "triton" and device.type == "cpu" and not interpreted():
        raise ValueError(
            f"{source}='triton': Triton kernels need a GPU, and these tensors are on the CPU; 'torch' works here, and "
            "TRITON_INTERPRET=1 in the environment runs the kernels in Triton's slow interpreter"
        )
    return chosen


def chosen_by_name() -> str | None:
    """What `set_default_backend` or the environment's `KERNELS_BACKEND` ask for, or None."""
    return next((name for name in _process_wide().values() if name), None)


def _process_wide() -> dict[str, str | None]:
    return {"set_default_backend": _default, "KERNELS_BACKEND": os.environ.get("KERNELS_BACKEND")}


def set_default_backend(backend: str | None) -> None:
    """What every operation of this process uses that is not told otherwise; None goes back to choosing by device.

    Raises:
        ValueError: the name is not a backend.
    """
    global _default  # noqa: PLW0603 - one choice a process, like torch.set_default_dtype
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"set_default_backend={backend!r}: this version has {', '.join(BACKENDS)}")
    _default = backend


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"
