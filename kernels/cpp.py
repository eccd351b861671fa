"""C++ kernels for CPUs, `kernels/*/kernel.cpp`: compiled, loaded and called.

All of them are one library. The compiler, its flags and its cache folder are those of torch.compile, which needs a C++
compiler on a CPU anyway. All but LAMB's take bf16, so they serve mixed precision.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from kernels import torch_private

_FLAGS = ("-ftree-loop-vectorize", "-ffp-contract=fast", "-fno-math-errno")  # to make vectors of plain loops

_TAGS = (torch.Tag.flexible_layout,)  # of operations: they take tensors however they lie, so that none is copied before


def unavailable() -> str | None:
    """Why the kernels cannot be used here, in a few words, or None; compiles them where that has not happened yet."""
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


def source() -> str:
    """That of all of them, after what they have in common."""
    folder = Path(__file__).parent
    files = [folder / "numbers.h", *sorted(folder.glob("*/kernel.cpp"))]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def compiled(source: str) -> ctypes.CDLL:
    """The library, compiled where that has not happened yet: in about two seconds."""
    return torch_private.load_cpp(source, _FLAGS)


def call(name: str, arguments: Sequence[Tensor | ctypes.Array | int | float | None]) -> None:
    """Run a kernel: tensors become pointers to their first entry, None a null pointer, numbers int64_t or float.

    Arrays are handed over as they are.
    """
    function = getattr(library(), name)
    if function.argtypes is None:
        function.argtypes, function.restype = [_type(argument) for argument in arguments], None
    function(*(argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments))


def _type(argument: Tensor | ctypes.Array | float | None) -> type:
    if isinstance(argument, int):
        return ctypes.c_int64
    return ctypes.c_float if isinstance(argument, float) else ctypes.c_void_p


def operation(fake: Callable) -> Callable[[Callable], Callable]:
    """Register a function as an operation `kernels::…` of its name, for CPUs, which returns new tensors.

    It is for compiled code: there is no gradient, and nothing is checked at a call, which takes half the time of one of
    torch.library.custom_op's.

    Args:
        fake: the same without values, for tracing.
    """

    def register(function: Callable) -> Callable:
        name = f"kernels::{function.__name__}"
        torch.library.define(name, torch.library.infer_schema(function, mutates_args=()), tags=_TAGS)
        torch.library.impl(name, "cpu", function)
        torch.library.register_fake(name, fake)
        return getattr(torch.ops.kernels, function.__name__).default

    return register
