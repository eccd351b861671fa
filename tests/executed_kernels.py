"""Some of each operation's comparisons, executed as machine code: `python -m tests.executed_kernels TARGET [OP …]`.

The tests' own process interprets kernels, so another compiles them. With PLANT in the environment, "PATTERN=TEXT", each
kernel's instructions that match are replaced. Prints JSON: comparisons (name, error, bound) by operation, findings, and
blocks by kernel.
"""

import json
import os
import re
import sys

os.environ.pop("TRITON_INTERPRET", None)

import torch

from kernels.depth_mix import check as depth_mix
from kernels.dropout import check as dropout
from kernels.gated_norm import check as gated_norm
from kernels.lamb import check as lamb
from kernels.machine_code import execution
from kernels.masked_cross_entropy import check as masked_cross_entropy
from kernels.normalize import check as normalize
from kernels.span_mask import check as span_mask

CPU, BF16 = torch.device("cpu"), torch.bfloat16
COMPARISONS = {
    "masked_cross_entropy": lambda: [
        *masked_cross_entropy._from_logits(CPU, "triton", BF16, 131, has_segments=True),
        *masked_cross_entropy._sums(CPU, "triton", 4096),
        *masked_cross_entropy._multiplied(CPU, "triton"),
    ],
    "span_mask": lambda: span_mask._compare(span_mask._CASES[2], CPU, "triton"),
    "lamb": lambda: lamb._compare_step(lamb._CASES[0], CPU, "triton"),
    "gated_norm": lambda: gated_norm.compare_fused(CPU, 5, 16, BF16, is_tanh=True),
    "depth_mix": lambda: depth_mix.compare_fused(CPU, 4, 40, 7, BF16),
    "normalize": lambda: [
        *normalize.compare_embedding(CPU, 5, 16),
        *normalize.compare_table(CPU, 150, 16),
        *normalize.compare_activation(CPU, 18, 40, BF16),
    ],
    "dropout": lambda: dropout.compare_dropouts(CPU, BF16),
}


def planted(disassemble, pattern, text):
    """The disassembler, with a fault in what it prints."""
    return lambda cubin: re.sub(pattern, text, disassemble(cubin))


if __name__ == "__main__":
    target, *operations = sys.argv[1:]
    if plant := os.environ.get("PLANT"):
        execution.disassemble = planted(execution.disassemble, *plant.split("="))
    with execution.executed(target) as done:
        results = {
            operation: [(each.name, each.error, each.bound) for each in COMPARISONS[operation]()]
            for operation in operations or COMPARISONS
        }
    print(json.dumps({"comparisons": results, "findings": done.findings, "blocks": done.blocks}))
