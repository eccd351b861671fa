"""C++ kernels, `kernels/*/kernel.cpp`: what Triton's are on a GPU, on a CPU beside torch.compile.

All of them are one library. The compiler, its flags and the folder of what it made are torch.compile's own, which on a
CPU needs a C++ compiler anyway. All but LAMB's take bf16, so they serve mixed precision; everything else is PyTorch's.
"""

import ctypes
import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from kernels.backend import chosen_by_name

_FLAGS = ("-ftree-loop-vectorize", "-ffp-contract=fast", "-fno-math-errno")  # to make vectors of plain loops

TAGS = (torch.Tag.flexible_layout,)  # of operations: they take tensors however they lie, so that none is copied before

_is_loaded = False


def load() -> bool:
    """Have C++ kernels serve compiled code from now on, unless a backend was chosen by name; returns whether they do.

    Raises:
        torch._inductor.exc.CppCompileError: the compiler has something against them.
        torch._inductor.exc.InvalidCxxCompiler: there is none.
    """
    global _is_loaded  # noqa: PLW0603 - what a process has loaded
    _is_loaded = chosen_by_name() is None
    if _is_loaded:
        library()
    return _is_loaded


def serves(x: Tensor) -> bool:
    """Whether C++ kernels take `x`, in code that torch.compile traces."""
    return _is_loaded and torch.compiler.is_compiling() and x.device.type == "cpu" and x.dtype == torch.bfloat16


def is_loaded() -> bool:
    """Whether `load` was successful."""
    return _is_loaded


@contextmanager
def serving() -> Iterator[None]:
    """A block in which C++ kernels serve, whatever was loaded or chosen before."""
    global _is_loaded  # noqa: PLW0603 - see `load`
    before, _is_loaded = _is_loaded, True
    try:
        yield
    finally:
        _is_loaded = before


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
    codecache = importlib.import_module("torch._inductor.codecache")
    return codecache.CppCodeCache.load(source, device_type="cpu", needs_vec_isa=True, extra_flags=_FLAGS)


def call(name: str, arguments: Sequence[Tensor | ctypes.Array | int | float | None]) -> None:
    """Run a kernel: tensors become pointers to their first entry, None a null pointer, numbers int64_t or float.

    Arrays are handed over as they are.
    """
    library()[name](*(_argument(argument) for argument in arguments))


def _argument(
    argument: Tensor | ctypes.Array | float | None,
) -> ctypes.Array | ctypes.c_void_p | ctypes.c_int64 | ctypes.c_float:
    if isinstance(argument, ctypes.Array):
        return argument
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_int64(argument) if isinstance(argument, int) else ctypes.c_float(argument)
