"""Kernels compiled for sm_80 and sm_90 with their launches, for tests of `kernels.machine_code`.

The tests' own process interprets kernels, so another compiles them: `python -m tests.machine_code FILE SHAPE …`, with
shapes such as "d=64 T=128 dropout". It writes a file for `torch.load`.
"""

import dataclasses
import itertools
import os
import re
import sys
from types import SimpleNamespace

os.environ.pop("TRITON_INTERPRET", None)

import torch

from kernels import inspect as kernels_inspect
from kernels.attention_context import kernel as attention
from kernels.machine_code import cubin, measurement
from kernels.machine_code.examples import AttentionInputs
from kernels.machine_code.launch import recorded

NUM_ROWS = 4
TARGETS = ("sm_80", "sm_90")


def compile_attention(match, target):
    """The kernels of one shape, and launches of them on the same tensors; the inputs, and gradients to be written."""
    configurations = [each for each in attention.configurations() if re.search(match, each.name)]
    inputs = AttentionInputs.of(configurations[-1], NUM_ROWS)
    grad = torch.randn(*inputs.projection.shape[:2], inputs.projection.shape[2] // 4).bfloat16()
    of_projection = torch.zeros_like(inputs.projection)
    with recorded() as launches:
        output, lse, table = inputs.launch_forward()
        inputs.launch_backward(grad, output, lse, table, of_projection)
    compiled = {}
    for configuration, launch in zip(configurations, launches, strict=True):
        assert not launch.differences(configuration)
        built, _ = kernels_inspect._compile(configuration, kernels_inspect.TARGETS[target])
        listing = cubin.disassemble(built.asm["cubin"])
        compiled[launch.kernel] = SimpleNamespace(
            listing=listing, launch=launch, types=dict(configuration.types), shared_bytes=built.metadata.shared
        )
    return compiled, inputs, grad, of_projection


def notes():
    """What a listing with an unknown instruction, no disassembler, and another launch than compiled lead to."""
    configuration = next(each for each in attention.configurations() if " T=16" in each.name)
    built, _ = kernels_inspect._compile(configuration, kernels_inspect.TARGETS["sm_90"])
    disassemble, found = measurement.disassemble, {}

    def missing(_):
        raise OSError("no cuobjdump")

    for name, function in (("unknown", lambda code: disassemble(code).replace("S2R ", "S2X ")), ("missing", missing)):
        measurement.disassemble = function
        found[name] = measurement.measure(configuration, built.asm["cubin"], built.metadata.shared)
    measurement.disassemble = disassemble
    other = dataclasses.replace(configuration, constants={**configuration.constants, "SPAN": 64})
    found["other"] = measurement.measure(other, built.asm["cubin"], built.metadata.shared)
    return found


if __name__ == "__main__":
    torch.manual_seed(3)
    path, *shapes = sys.argv[1:]
    cases = itertools.product(TARGETS, shapes)
    torch.save(({(target, shape): compile_attention(f" {shape}$", target) for target, shape in cases}, notes()), path)
