"""C++ kernels for CPUs, `kernels/*/kernel.cpp`: compile, load and call them.

All kernels are one library, built with the compiler, flags and cache folder of torch.compile, which needs a C++
compiler on a CPU anyway. All kernels but LAMB's take bf16.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels import torch_private

_FLAGS = ("-ftree-loop-vectorize", "-ffp-contract=fast", "-fno-math-errno")  # to vectorize plain loops

_TAGS = (torch.Tag.flexible_layout,)  # of operations: any strides, so that Inductor copies no input


def unavailable() -> str | None:
    """The reason why the kernels cannot be used here, or None; compiles them if they are not cached."""
    if not torch_private.loads_cpp():
        return f"PyTorch {torch.__version__} loads no C++"
    try:
        library()
    except torch_private.compile_errors() as error:
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return None


@cache
def library() -> ctypes.CDLL:
    """All C++ kernels of this folder."""
    return compiled(source())


def source(*operations: str) -> str:
    """The source of all kernels, or of some operations', after `numbers.h`."""
    folder = Path(__file__).parent
    kernels = [folder / op / "kernel.cpp" for op in operations] or folder.glob("*/kernel.cpp")
    files = [folder / "numbers.h", *sorted(kernels)]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def compiled(source: str) -> ctypes.CDLL:
    """The library of a source, from the cache, or compiled in about two seconds."""
    return torch_private.load_cpp(source, _FLAGS)


def call(name: str, arguments: Sequence[Tensor | ctypes.Array[Any] | int | float | None]) -> None:
    """Run a kernel. Tensors become pointers to their first element, None a null pointer, numbers int64_t or float.

    ctypes arrays are passed unchanged.

    Raises:
        ValueError: a tensor is not on the CPU, where its address leads elsewhere.
    """
    function = getattr(library(), name)
    if function.argtypes is None:
        function.argtypes, function.restype = [_type(argument) for argument in arguments], None
    function(*(_address(argument) if isinstance(argument, Tensor) else argument for argument in arguments))


def _address(tensor: Tensor) -> int:
    if tensor.device.type != "cpu":
        raise ValueError(f"C++ kernels take tensors on the CPU; one of {list(tensor.shape)} is on {tensor.device}")
    return tensor.data_ptr()


def _type(argument: Tensor | ctypes.Array[Any] | float | None) -> type:
    if isinstance(argument, int):
        return ctypes.c_int64
    return ctypes.c_float if isinstance(argument, float) else ctypes.c_void_p


def operation(fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function that returns new tensors as the CPU operation `kernels::<its name>`.

    No autograd formula, and no checks, so a call takes half the time of a torch.library.custom_op call.

    Args:
        fake: returns tensors of the same shapes and dtypes, for tracing.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = f"kernels::{function.__name__}"
        torch.library.define(name, torch.library.infer_schema(function, mutates_args=()), tags=_TAGS)
        torch.library.impl(name, "cpu", function)
        torch.library.register_fake(name, fake)
        return getattr(torch.ops.kernels, function.__name__).default

    return register
