"""Comparisons of integers, and what is done with predicates."""

import numpy as np

from kernels.machine_code.listing import Instruction
from kernels.machine_code.machine import Machine, executes

COMPARISONS = {
    "GE": np.greater_equal,
    "GT": np.greater,
    "LE": np.less_equal,
    "LT": np.less,
    "EQ": np.equal,
    "NE": np.not_equal,
}
_COMBINATIONS = {"AND": np.logical_and, "OR": np.logical_or, "XOR": np.logical_xor}


@executes("ISETP UISETP", "GE GT LE LT EQ NE AND OR XOR U32 EX")
def compare(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """A comparison and its opposite, each combined with a predicate; EX: of high words, where low ones decide ties."""
    _, _, first, second, _, *low = instruction.operands
    read = machine.whole if "U32" in instruction.modifiers else machine.signed
    left, right = read(first), read(second)
    holds = COMPARISONS[instruction.modifiers[0]](left, right)
    if "EX" in instruction.modifiers:
        holds = np.where(left == right, machine.truth(low[0]), holds)
    decide_both(machine, instruction, holds, lanes)


def decide_both(machine: Machine, instruction: Instruction, holds: np.ndarray, lanes: np.ndarray) -> None:
    """Store whether a comparison holds and whether not, in two predicates, each combined with a third."""
    output, opposite, _, _, other, *_ = instruction.operands
    combine = _COMBINATIONS[next(name for name in instruction.modifiers if name in _COMBINATIONS)]
    condition = machine.truth(other).copy()  # it may be a destination too
    machine.decide(output, combine(holds, condition), lanes)
    machine.decide(opposite, combine(~holds, condition), lanes)


@executes("PLOP3 UPLOP3", "LUT")
def predicate_logic(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """Any function of three predicates, given as a table of eight; one table for each of two destinations."""
    first, second, *rest = instruction.operands
    inputs, tables = [machine.truth(operand) for operand in rest[:3]], rest[3:]
    number = inputs[0] * 4 + inputs[1] * 2 + inputs[2]
    for output, table in zip((first, second), tables, strict=True):
        machine.decide(output, table.row >> number & 1 != 0, lanes)


@executes("P2R")
def from_predicates(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """Predicates as bits of a register, those of a mask; the others come from another."""
    target, _, source, mask = instruction.operands
    value = machine.whole(source) & ~np.uint32(mask.row)
    undefined = machine.undefined[source.row] & ~np.uint32(mask.row)
    for index in range(7):
        if mask.row >> index & 1:
            value = value | machine.predicates[index].astype(np.uint32) << np.uint32(index)
            undefined = undefined | machine.is_undecided[index].astype(np.uint32) << np.uint32(index)
    machine.write(target, value, lanes, undefined=undefined)


@executes("R2P")
def to_predicates(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """The reverse, from the register's lowest byte or that of its part."""
    _, source, mask = instruction.operands
    first = 8 * int(source.part.removeprefix("B") or 0)
    bits, undefined = machine.bits(source) >> np.uint32(first), machine.undefined[source.row] >> np.uint32(first)
    for index in range(7):
        if mask.row >> index & 1:
            np.copyto(machine.predicates[index], bits >> np.uint32(index) & np.uint32(1) != 0, where=lanes)
            np.copyto(machine.is_undecided[index], undefined >> np.uint32(index) & np.uint32(1) != 0, where=lanes)
