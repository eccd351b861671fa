"""The list of operations, and what it takes to build a Triton kernel without a GPU."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

# the folders of kernels/
OPERATIONS = (
    "masked_cross_entropy",
    "span_mask",
    "lamb",
    "attention_context",
    "gated_norm",
    "depth_mix",
    "add_bias",
    "normalize",
    "dropout",
)
_SOURCES = {"triton": "kernel.py", "cpp": "kernel.cpp"}


def operations(backend: str) -> tuple[str, ...]:
    """Those with kernels of a backend, see `kernels.backend`; all of them for "torch"."""
    folder, source = Path(__file__).parent, _SOURCES.get(backend, "")
    return tuple(op for op in OPERATIONS if (folder / op / source).exists())


TRITON_OPERATIONS = operations("triton")


@dataclass(frozen=True)
class Configuration:
    """One way in which a launcher can start a kernel.

    Every `kernel.py` has a function `configurations()` that lists all of them, from the same tables that its launchers
    choose from, so that what is inspected is what runs.

    Attributes:
        name: operation, kernel and what sets this configuration apart, such as "lamb/moments fp32".
        kernel: the `@triton.jit` function.
        types: Triton's type of each run-time argument: "*bf16", "i64", "fp32".
        constants: value of each `tl.constexpr` argument.
        num_warps: of each program, counted in warps of 32 threads; see `fitting_warps`.
        max_registers: a thread's limit on NVIDIA GPUs (Triton's `maxnreg`), or None.
        aligned: run-time arguments that are multiples of 16 (pointers: bytes), as the JIT finds out at launch.
        streams: whether memory traffic is what it costs, so that 128-bit loads and stores are required.
        may_spill: whether registers may run out, which needs a reason beside it in the code.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    max_registers: int | None = None
    aligned: frozenset[str] = frozenset()
    streams: bool = True
    may_spill: bool = False


def fitting_warps(num_warps: int, warp_size: int) -> int:
    """How many warps of `warp_size` threads (AMD: 64) have the threads of `num_warps` warps of 32."""
    return max(1, num_warps * 32 // warp_size)


def launch_warps(num_warps: int) -> int:
    """`fitting_warps` on this machine's GPU."""
    return fitting_warps(num_warps, 64 if torch.version.hip else 32)
