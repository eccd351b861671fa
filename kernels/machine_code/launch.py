"""A launch of a kernel, as the project's launchers make it, but recorded instead of executed; no GPU is needed."""

import importlib
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from kernels.configuration import Configuration

_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*u1",
}
_FORMATS = {"i1": "b", "u1": "b", "i32": "i", "u32": "I", "i64": "q", "u64": "Q", "fp32": "f", "fp64": "d"}


@dataclass(frozen=True)
class Launch:
    """One launch.

    Attributes:
        kernel: the function's name.
        grid: numbers of thread blocks.
        arguments: by name, in order: tensors on the CPU and numbers, constants too.
        num_warps: of a thread block.
    """

    kernel: str
    grid: tuple[int, int, int]
    arguments: Mapping[str, Any]
    num_warps: int

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those among the arguments."""
        return {name: value for name, value in self.arguments.items() if isinstance(value, Tensor)}

    def differences(self, configuration: Configuration) -> list[str]:
        """Arguments for which the configuration's code was not compiled."""
        wrong = [name for name, value in configuration.constants.items() if self.arguments.get(name) != value]
        for name, kind in configuration.types.items():
            value = self.arguments.get(name)
            if kind != (_TYPES.get(value.dtype) if isinstance(value, Tensor) else kind):
                wrong.append(name)
            if name in configuration.aligned and _granularity(value) % 16:
                wrong.append(name)
        if (self.kernel, self.num_warps) != (configuration.kernel.fn.__name__, configuration.num_warps):
            wrong.append("kernel")
        return wrong

    def parameters(self, types: Mapping[str, str], pointers: Mapping[str, int]) -> bytes:
        """The block of arguments that the machine code reads.

        Args:
            types: of each argument that is no constant, as in `Configuration`.
            pointers: address of each tensor.
        """
        packed = b""
        for name, value in self.arguments.items():
            if name in types:
                layout = "Q" if name in pointers else _FORMATS[types[name]]
                number = pointers.get(name, value)
                packed += bytes(-len(packed) % struct.calcsize(layout))
                packed += struct.pack(layout, number if layout in "fd" else int(number))
        return packed


def _granularity(value: Any) -> int:
    """A number that divides an argument: of a tensor, its offset in bytes."""
    return int(value.storage_offset()) * value.element_size() if isinstance(value, Tensor) else int(value)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Context manager: yields a list that gets the launches of Triton kernels in the block, none of which runs."""
    launches = []

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, num_warps: int = 4, **settings: Any) -> None:
        del warmup
        names = kernel.arg_names
        given = {**dict(zip(names, args, strict=False)), **settings}
        size = grid(given) if callable(grid) else grid
        arguments = {name: given[name] for name in names}
        launches.append(Launch(kernel.fn.__name__, (*size, 1, 1)[:3], arguments, num_warps))

    with patch.object(importlib.import_module("triton.runtime.jit").JITFunction, "run", record):
        yield launches
