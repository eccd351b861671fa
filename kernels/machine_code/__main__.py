"""Every Triton kernel against its reference, as machine code on a CPU: `python -m kernels.machine_code`.

The comparisons are those of `kernels.check`.
"""

import os
import sys
from dataclasses import dataclass
from typing import Literal

import torch
import tyro

from kernels.check import print_table, run_checks
from kernels.configuration import TRITON_OPERATIONS
from kernels.inspect import TARGETS, ToolchainError, check_toolchain
from kernels.machine_code.listing import ARCHITECTURES


@dataclass(frozen=True, kw_only=True)
class MachineCodeConfig:
    """Compile every kernel for a GPU, execute its machine code on the CPU, and compare results with the reference."""

    op: tuple[Literal[TRITON_OPERATIONS], ...] = TRITON_OPERATIONS  # type: ignore[valid-type]  # tyro sees the values
    """Operations to check."""
    target: Literal[tuple(name for name in TARGETS if name in ARCHITECTURES)] = "sm_90"  # type: ignore[valid-type]  # likewise
    """The GPU."""


def main() -> None:
    """Entry point. Exit status 1 if a comparison fails or code is wrong, 2 if a tool is missing."""
    config = tyro.cli(MachineCodeConfig, use_underscores=True)
    os.environ.pop("TRITON_INTERPRET", None)  # Triton is not imported yet
    try:
        check_toolchain([config.target])
    except ToolchainError as error:
        print(f"kernels.machine_code: {error}", file=sys.stderr)
        sys.exit(2)
    from kernels.machine_code.execution import executed  # noqa: PLC0415 - needs Triton

    is_right = True
    with executed(config.target) as execution:
        for op in config.op:
            rows = run_checks(torch.device("cpu"), "triton", ops=(op,))
            print_table(rows)
            is_right = is_right and all(row.passed for row in rows)
    blocks = ", ".join(f"{count:,} of {kernel}" for kernel, count in execution.blocks.items())
    print(f"machine code of {config.target}, thread blocks executed: {blocks}")
    for finding in execution.findings:
        print(finding, file=sys.stderr)
    sys.exit(0 if is_right and not execution.findings else 1)


if __name__ == "__main__":
    main()
