"""Every private name of PyTorch that this project uses, and what happens without it.

PyTorch keeps such names from one release to the next, or does not; the project takes releases from 2.11 on. Nothing
else in `kernels` and `gptbert` uses one, and nothing here is found out before it is needed: to import the compiler
takes seconds.
"""

import ctypes
import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


def assert_async(condition: Tensor, message: str) -> None:
    """Raise if a scalar is false: on the CPU at once, on a GPU without waiting for it, as a device assert.

    Without `torch._assert_async` the same on the CPU, and no check on a GPU, since all others wait for it.

    Raises:
        RuntimeError: it is false.
    """
    if hasattr(torch, "_assert_async"):
        torch._assert_async(condition, message)
    elif condition.device.type == "cpu" and not condition:
        raise RuntimeError(message)


def fused_adamw() -> Callable[..., None] | None:
    """The step of AdamW in one pass over the memory of lists of tensors, which torch.optim.AdamW(fused=True) calls.

    Without `torch._fused_adamw_` None: LAMB on a CPU is then its reference, whose temporary tensors are as large as the
    parameters, and whose last bits differ.
    """
    return getattr(torch, "_fused_adamw_", None)


def process_group(name: str) -> ProcessGroup:
    """The group of processes of a `group_name`, which is what an operation's schema can take.

    Without `_resolve_process_group` LAMB does not run on shards (`--parallel fsdp`); all else does.

    Raises:
        RuntimeError: there is none of the name, or PyTorch does not find groups by name.
    """
    module = importlib.import_module("torch.distributed.distributed_c10d")
    if not hasattr(module, "_resolve_process_group"):
        raise RuntimeError(f"PyTorch {torch.__version__} does not find a process group by its name")
    return module._resolve_process_group(name)


def loads_cpp() -> bool:
    """Whether `load_cpp` works; without, compiled code on a CPU does without C++ kernels."""
    code_cache = getattr(_module("torch._inductor.codecache"), "CppCodeCache", None)
    return hasattr(code_cache, "load_async") and {"device_type", "extra_flags"} <= _parameters(code_cache.load_async)


def load_cpp(source: str, flags: Sequence[str]) -> ctypes.CDLL:
    """A library of C++, from torch.compile's cache on the disk or compiled there, for the vector units of this CPU.

    The compiler and its flags are those of torch.compile; `flags` come on top.

    Raises:
        torch._inductor.exc.CppCompileError: the compiler has something against the source.
        torch._inductor.exc.InvalidCxxCompiler: there is none.
    """
    code_cache = importlib.import_module("torch._inductor.codecache").CppCodeCache
    return code_cache.load(source, device_type="cpu", extra_flags=tuple(flags))


def compile_errors() -> tuple[type[Exception], ...]:
    """What torch.compile raises where a model cannot be compiled.

    A name that is missing is left out: the error is then a traceback instead of one line.
    """
    names = {
        "torch._dynamo.exc": ("TorchDynamoException",),
        "torch._inductor.exc": ("InvalidCxxCompiler", "CppCompileError"),
    }
    found = (getattr(_module(module), name, None) for module, names in names.items() for name in names)
    return tuple(error for error in found if error is not None)


@contextmanager
def restored_autograd_compiler(*names: str) -> Iterator[None]:
    """A block after which settings of `torch._functorch.config` have the values from before it."""
    config = _module("torch._functorch.config")
    before = {name: getattr(config, name) for name in names if hasattr(config, name)}
    try:
        yield
    finally:
        _configure("torch._functorch.config", before)


def configure_autograd_compiler(**settings: Any) -> None:
    """Set what torch.compile keeps of a forward for the backward (`torch._functorch.config`), for the whole process.

    A setting that PyTorch does not have is left out: the compiled step then takes more memory or time.
    """
    _configure("torch._functorch.config", settings)


def inductor_options(settings: dict[str, Any]) -> dict[str, Any]:
    """`options` of torch.compile: those of `torch._inductor.config` that this PyTorch has.

    A setting that it does not have is left out: compiled code then takes more time.
    """
    config = _module("torch._inductor.config")
    return {name: value for name, value in settings.items() if hasattr(config, name)}


def mark_any_size(tensor: Tensor, dim: int) -> None:
    """Have torch.compile make one code for all sizes of a dimension from 1 on, told nothing of the present one.

    Without its argument `min`, as in PyTorch 2.11, that code is told nothing of the least size either; without
    `mark_unbacked` there are two codes, one of them for the size 1.
    """
    decorators = importlib.import_module("torch._dynamo.decorators")
    if hasattr(decorators, "mark_unbacked"):
        mark = decorators.mark_unbacked
        mark(tensor, dim, **({"min": 1} if "min" in _parameters(mark) else {}))
    else:
        decorators.maybe_mark_dynamic(tensor, dim)


@cache
def _parameters(function: Callable) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _configure(name: str, settings: dict[str, Any]) -> None:
    config = _module(name)
    for setting, value in settings.items():
        if hasattr(config, setting):
            setattr(config, setting, value)


def _module(name: str) -> ModuleType | None:
    """A module of PyTorch's, None where there is none."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None
