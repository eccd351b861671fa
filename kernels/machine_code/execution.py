"""Triton launches on CPU tensors, executed as a GPU's machine code: a stand-in for Triton's driver.

Triton's own path is used as it is: arguments are bound and specialized, the compiler builds for the target, and a
launch gets what the GPU's driver would get.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

from kernels import backend
from kernels.assembler import use_right_assembler
from kernels.inspect import TARGETS
from kernels.machine_code.cubin import constants, disassemble
from kernels.machine_code.emulation import emulate
from kernels.machine_code.launch import Launch
from kernels.machine_code.listing import Listing

_MOST_THREADS = 1024


class Binary(NamedTuple):
    """A loaded kernel."""

    listing: Listing
    shared_bytes: int


class Execution:
    """What was executed.

    Attributes:
        findings: faults of the code, one line each, with the kernel's name.
        blocks: how many were executed, by operation and kernel.
    """

    def __init__(self) -> None:
        self.findings: list[str] = []
        self.blocks: dict[str, int] = {}

    def launcher(self, source: Any, metadata: Any) -> Callable[..., None]:
        """Triton's launcher of a compiled kernel."""
        names = list(source.fn.arg_names)
        kernel = f"{source.fn.__module__.split('.')[1]}'s {source.fn.__name__}"
        constants = {names[path[0]] for path in source.constants}
        types = {name: kind for name, kind in source.signature.items() if name not in constants and kind != "constexpr"}

        def launch(x: int, y: int, z: int, _stream: int, binary: Binary, *more: Any) -> None:
            arguments = dict(zip(names, more[-len(names) :], strict=True))
            made = Launch(source.fn.__name__, (x, y, z), arguments, metadata.num_warps)
            blocks = [(i, j, k) for k in range(z) for j in range(y) for i in range(x)]
            done = emulate(binary.listing, made, types, binary.shared_bytes, blocks, has_padding=True)
            self.blocks[kernel] = self.blocks.get(kernel, 0) + len(blocks)
            for finding in done.findings:
                text = f"{kernel}: {finding}"
                if text not in self.findings:
                    self.findings.append(text)

        return launch


@contextmanager
def executed(target: str) -> Iterator[Execution]:
    """Context manager: Triton kernels take CPU tensors and run as a target's machine code.

    The process must not have launched a kernel before, and launches none elsewhere meanwhile.

    Args:
        target: a key of `kernels.inspect.TARGETS` and of `kernels.machine_code.listing.ARCHITECTURES`.

    Yields:
        What was executed so far.
    """
    execution = Execution()
    use_right_assembler()
    with driven(target, execution.launcher, _load):
        yield execution


@contextmanager
def driven(
    target: str, launcher: Callable[[Any, Any], Callable[..., None]], load: Callable[..., Any]
) -> Iterator[None]:
    """Context manager: Triton kernels take CPU tensors, and a stand-in for the GPU's driver loads and launches them.

    Args:
        target: a key of `kernels.inspect.TARGETS`.
        launcher: from a kernel's source and metadata to a function that launches it, as Triton calls it.
        load: from a kernel's name, file, shared memory and device to what `_load` returns.
    """
    runtime = importlib.import_module("triton.runtime")
    architecture = importlib.import_module("triton.backends.compiler").GPUTarget(*TARGETS[target][:3])
    properties = {
        "max_shared_mem": TARGETS[target].shared_bytes,
        "multiprocessor_count": 132,
        "warpSize": architecture.warp_size,
    }
    driver = SimpleNamespace(
        get_current_target=lambda: architecture,
        get_current_device=lambda: 0,
        get_current_stream=lambda _: 0,
        launcher_cls=launcher,
        utils=SimpleNamespace(get_device_properties=lambda _: properties, load_binary=load),
    )
    with patch.object(runtime.driver, "_active", driver), patch.object(backend, "stands_in_for_gpu", new=True):
        yield


def _load(_name: str, cubin: bytes, shared_bytes: int, _device: int) -> tuple[object, Binary, int, int, int]:
    """A module, a kernel, registers and spills of it, and the most threads of a block."""
    return object(), Binary(Listing.parse(disassemble(cubin), constants(cubin)), shared_bytes), 0, 0, _MOST_THREADS
