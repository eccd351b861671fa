"""The choice of an operation's implementation: PyTorch, Triton on GPUs, or C++ on CPUs."""

import importlib
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("torch", "triton", "cpp")

_TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None  # PyTorch 2.11 cannot trace find_spec

_default: str | None = None

# Whether launches on CPU tensors do what a GPU would: `kernels.machine_code.execution`, and tests.
stands_in_for_gpu = False


def choose_backend(backend: str | None, device: torch.device) -> str:
    """Resolve an operation's `backend` argument.

    In order of precedence: the argument, `set_default_backend`, `KERNELS_BACKEND` in the environment, the device:
    "triton" on a GPU if Triton is installed, else "torch". The device never selects "cpp", since its first use loads
    PyTorch's compiler, which takes seconds; a compiled training run on a CPU sets it. An operation without a kernel for
    its input's dtype falls back to PyTorch.

    Args:
        backend: a name from `BACKENDS`, or None.
        device: of the operation's tensors.

    Raises:
        ValueError: the name is not a backend, Triton is not installed, or the backend cannot run on `device`.
    """
    named = {"backend": backend, **_process_wide()}
    source, chosen = next(((source, name) for source, name in named.items() if name), (None, None))
    if chosen is None:
        return "triton" if device.type == "cuda" and _TRITON_IS_INSTALLED else "torch"
    if chosen not in BACKENDS:
        raise ValueError(f"{source}={chosen!r}: this version has {', '.join(BACKENDS)}")
    if chosen == "triton" and not _TRITON_IS_INSTALLED:
        raise ValueError(f"{source}='triton': Triton is not installed (pip install triton, Linux only); 'torch' works")
    if chosen == "triton" and device.type == "cpu" and not (interpreted() or stands_in_for_gpu):
        raise ValueError(
            f"{source}='triton': Triton kernels need a GPU, and these tensors are on the CPU; 'torch' works here, and "
            "TRITON_INTERPRET=1 in the environment runs the kernels in Triton's slow interpreter"
        )
    if chosen == "triton" and device.type == "mps":
        raise ValueError(f"{source}='triton': Triton has no kernels for Apple's MPS; 'torch' works")
    if chosen == "cpp" and device.type not in {"cpu", "meta"}:
        raise ValueError(f"{source}='cpp': C++ kernels are for CPUs, and these tensors are on {device}; 'torch' works")
    return chosen


def triton_kernel(operation: str) -> Any:
    """The module `kernels.<operation>.kernel`, imported at the first use, since Triton may be missing."""
    return importlib.import_module(f"kernels.{operation}.kernel")


def uses_cpp(tensor: Tensor, backend: str | None = None) -> bool:
    """Whether an operation runs its C++ kernel: bf16, on a CPU, backend "cpp".

    Args:
        tensor: the operation's input.
        backend: as for `choose_backend`.
    """
    is_taken = tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu"
    return is_taken and choose_backend(backend, tensor.device) == "cpp"


def widest_float(device: torch.device) -> torch.dtype:
    """The dtype of sums that should lose nothing: fp64, or fp32 on Apple's MPS, which has no fp64."""
    return torch.float32 if device.type == "mps" else torch.float64


def chosen_by_name() -> str | None:
    """The name given by `set_default_backend` or the environment's `KERNELS_BACKEND`, or None."""
    return next((name for name in _process_wide().values() if name), None)


def _process_wide() -> dict[str, str | None]:
    # the environment only without a default: compiled code would otherwise read it at every call
    return {"set_default_backend": _default} if _default else {"KERNELS_BACKEND": os.environ.get("KERNELS_BACKEND")}


def set_default_backend(backend: str | None) -> None:
    """Set the default of `backend` in this process; None restores the choice by environment and device.

    Raises:
        ValueError: the name is not a backend.
    """
    global _default  # noqa: PLW0603 - process-wide, like torch.set_default_dtype
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"set_default_backend={backend!r}: this version has {', '.join(BACKENDS)}")
    _default = backend


def computes_as_gpu(device: torch.device) -> bool:
    """Whether Triton kernels compute here what they do on a GPU; the interpreter gets products of 16 bits wrong."""
    return device.type == "cuda" or stands_in_for_gpu


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors: `TRITON_INTERPRET`, read as Triton reads it."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in {"1", "true", "yes", "on", "y"}
