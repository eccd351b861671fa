"""C++ kernels, `kernels/*/kernel.cpp`: what Triton's are on a GPU, on a CPU beside torch.compile.

All of them are one library. The compiler, its flags and the folder of what it made are torch.compile's own, which on a
CPU needs a C++ compiler anyway. All but LAMB's take bf16, so they serve mixed precision; everything else is PyTorch's.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from kernels import torch_private
from kernels.backend import chosen_by_name

_FLAGS = ("-ftree-loop-vectorize", "-ffp-contract=fast", "-fno-math-errno")  # to make vectors of plain loops

_TAGS = (torch.Tag.flexible_layout,)  # of operations: they take tensors however they lie, so that none is copied before

_is_loaded = False


def load() -> bool:
    """Have C++ kernels serve compiled code from now on, and return whether they do.

    They do not where a backend was chosen by name, or PyTorch has no compiler of C++ to offer.

    Raises:
        torch._inductor.exc.CppCompileError: the compiler has something against them.
        torch._inductor.exc.InvalidCxxCompiler: there is none.
    """
    global _is_loaded  # noqa: PLW0603 - what a process has loaded
    _is_loaded = chosen_by_name() is None and torch_private.loads_cpp()
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
