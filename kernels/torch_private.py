"""The private names of PyTorch that this project uses, each with a fallback.

PyTorch may rename or remove private names in any release; the project supports releases from 2.11 on. Nothing else in
`kernels` and `gptbert` uses them, except for `Tensor._version` in `gptbert/training/packed_weights.py`. All are looked
up on first use, because importing the compiler takes seconds.
"""

import ctypes
import importlib
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


def assert_async(condition: Tensor, message: str) -> None:
    """Raise if a scalar is false: on the CPU immediately, on a GPU by a device assert, without a device sync.

    Without `torch._assert_async` the same on the CPU, and no check on a GPU, which would need a device sync.

    Raises:
        RuntimeError: the scalar is false.
    """
    if hasattr(torch, "_assert_async"):
        torch._assert_async(condition, message)
    elif condition.device.type == "cpu" and not condition:
        raise RuntimeError(message)


def copy_each(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy each source into its target, whose dtype may be another, in a few launches.

    Without `torch._foreach_copy_` in a launch for each.
    """
    if targets and hasattr(torch, "_foreach_copy_"):  # which refuses none
        torch._foreach_copy_(targets, sources)
        return
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def fused_adamw() -> Callable[..., None] | None:
    """AdamW's step in one pass over lists of tensors, the function behind torch.optim.AdamW(fused=True).

    Without `torch._fused_adamw_` None: LAMB on a CPU then runs its reference, whose temporaries are as large as the
    parameters, and whose last bits differ.
    """
    return getattr(torch, "_fused_adamw_", None)


def process_group(name: str) -> ProcessGroup:
    """The process group of a `group_name`; an operation's schema can hold only the name.

    Without `_resolve_process_group` LAMB does not run on shards (`--parallel fsdp`); everything else does.

    Raises:
        RuntimeError: no group has the name, or PyTorch does not find groups by name.
    """
    module = importlib.import_module("torch.distributed.distributed_c10d")
    if not hasattr(module, "_resolve_process_group"):
        raise RuntimeError(f"PyTorch {torch.__version__} does not find a process group by its name")
    return module._resolve_process_group(name)


def end_failed_capture(device_index: int, pool: tuple[int, int]) -> None:
    """After the capture of a CUDA graph has failed, end it for random numbers and memory of the device, too.

    Where CUDA itself has ended the capture, as after a device sync, PyTorch 2.11 raises its error before it does so: it
    then refuses to draw random numbers, and `torch.cuda.empty_cache` fails. Without `_cuda_endAllocateToPool` that
    stays so.

    Args:
        device_index: of the GPU.
        pool: the capture's, of `torch.cuda.graph_pool_handle`.
    """
    generator = torch.cuda.default_generators[device_index]
    generator.graphsafe_set_state(generator.clone_state())  # the same numbers, in a state that no capture holds
    if hasattr(torch._C, "_cuda_endAllocateToPool"):
        with suppress(RuntimeError):  # it has ended already
            torch._C._cuda_endAllocateToPool(device_index, pool)


def loads_cpp() -> bool:
    """Whether `load_cpp` works; otherwise the backend "cpp" is unavailable."""
    code_cache: Any = getattr(_module("torch._inductor.codecache"), "CppCodeCache", None)
    return hasattr(code_cache, "load_async") and {"device_type", "extra_flags"} <= _parameters(code_cache.load_async)


def load_cpp(source: str, flags: Sequence[str]) -> ctypes.CDLL:
    """A C++ library for this CPU's SIMD units, loaded from torch.compile's disk cache or compiled into it.

    The compiler and its flags are those of torch.compile, plus `flags`.

    Raises:
        torch._inductor.exc.CppCompileError: the source does not compile.
        torch._inductor.exc.InvalidCxxCompiler: no compiler was found.
    """
    code_cache = importlib.import_module("torch._inductor.codecache").CppCodeCache
    return code_cache.load(source, device_type="cpu", extra_flags=tuple(flags))


def compile_errors() -> tuple[type[Exception], ...]:
    """The exceptions of torch.compile for a model that cannot be compiled.

    Missing names are omitted: the error is then a traceback instead of one line.
    """
    names = {
        "torch._dynamo.exc": ("TorchDynamoException",),
        "torch._inductor.exc": ("InvalidCxxCompiler", "CppCompileError"),
    }
    found = (getattr(_module(module), name, None) for module, names in names.items() for name in names)
    return tuple(error for error in found if error is not None)


def restored_autograd_compiler(*names: str) -> AbstractContextManager[None]:
    """Context manager: on exit, settings of `torch._functorch.config` have the values from before it."""
    config: Any = _module("torch._functorch.config")
    present = {name: getattr(config, name) for name in names if hasattr(config, name)}
    return config.patch(present) if present else nullcontext()


def configure_autograd_compiler(**settings: Any) -> None:
    """Set `torch._functorch.config`, process-wide: what torch.compile saves for the backward.

    Settings that this PyTorch lacks are omitted: the compiled step then takes more memory or time.
    """
    config = _module("torch._functorch.config")
    for setting, value in settings.items():
        if hasattr(config, setting):
            setattr(config, setting, value)


def inductor_options(settings: dict[str, Any]) -> dict[str, Any]:
    """`options` of torch.compile: the settings of `torch._inductor.config` that this PyTorch has.

    Settings that it lacks are omitted: compiled code is then slower.
    """
    config = _module("torch._inductor.config")
    return {name: value for name, value in settings.items() if hasattr(config, name)}


def mark_any_size(tensor: Tensor, dim: int) -> None:
    """Mark a dimension as dynamic (≥ 1): torch.compile generates one graph for all its sizes, without specializing.

    Without the argument `min`, as in PyTorch 2.11, the lower bound is unknown to the graph; without `mark_unbacked`
    there are two graphs, one of them for size 1.
    """
    decorators = importlib.import_module("torch._dynamo.decorators")
    if hasattr(decorators, "mark_unbacked"):
        mark = decorators.mark_unbacked
        mark(tensor, dim, **({"min": 1} if "min" in _parameters(mark) else {}))
    else:
        decorators.maybe_mark_dynamic(tensor, dim)


@cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _module(name: str) -> ModuleType | None:
    """A module of PyTorch, or None if it does not exist."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None
