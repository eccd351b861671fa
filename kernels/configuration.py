"""The list of operations, and the description of a Triton kernel to build without a GPU."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

# the folders of kernels/ that have an operation
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
    """The operations with a kernel for a backend of `kernels.backend`; all for "torch"."""
    folder, source = Path(__file__).parent, _SOURCES.get(backend, "")
    return tuple(op for op in OPERATIONS if (folder / op / source).exists())


TRITON_OPERATIONS = operations("triton")


@dataclass(frozen=True)
class Configuration:
    """A variant of a kernel that a launcher can start.

    `configurations()` of every `kernel.py` lists all variants, from the tables that its launchers use, so that the
    inspected kernels are those that run.

    Attributes:
        name: operation, kernel and distinguishing properties, such as "lamb/moments fp32".
        kernel: the `@triton.jit` function.
        types: Triton type of each run-time argument: "*bf16", "i64", "fp32".
        constants: value of each `tl.constexpr` argument.
        num_warps: per program, in warps of 32 threads; see `fitting_warps`.
        max_registers: limit per thread on NVIDIA GPUs (Triton's `maxnreg`), or None.
        aligned: run-time arguments divisible by 16 (pointers: bytes), as the JIT detects at launch.
        streams: whether it is bound by memory traffic, so that 128-bit loads and stores are required.
        words: of 128 bits in the block that a program loads or stores; if it has more threads, theirs are narrower.
        has_products: whether it has matrix products; see `kernels.assembler`.
        targets: the keys of `kernels.inspect.TARGETS` that it can start on; None: all.
        most_spilled: bytes of spill stores and loads allowed per thread, by target; "any" is for all others. A number
            above 0 must have a reason in the code.
        num_stages: of loops that the compiler pipelines; None: Triton's default.
        most_instructions: allowed per warp and tile, in the machine code of sm_90; see `kernels.machine_code`.
        most_wavefronts: the same for accesses of shared memory by a program's warps.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    max_registers: int | None = None
    aligned: frozenset[str] = frozenset()
    streams: bool = True
    words: float = math.inf
    has_products: bool = False
    targets: frozenset[str] | None = None
    most_spilled: Mapping[str, float] = field(default_factory=dict)
    num_stages: int | None = None
    most_instructions: float = math.inf
    most_wavefronts: float = math.inf


def fitting_warps(num_warps: int, warp_size: int) -> int:
    """The number of warps of `warp_size` threads (AMD: 64) equivalent to `num_warps` warps of 32; at least 1."""
    return max(1, num_warps * 32 // warp_size)


def launch_warps(num_warps: int) -> int:
    """`fitting_warps` for the warp size of this machine's GPU."""
    return fitting_warps(num_warps, 64 if torch.version.hip else 32)
