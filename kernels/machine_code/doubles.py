"""Operations on fp64, right up to the last bit or so: sums and products in the CPU's widest floating-point numbers."""

import numpy as np

from kernels.machine_code.floats import ORDERS, is_ordered
from kernels.machine_code.listing import Instruction
from kernels.machine_code.machine import Machine, executes
from kernels.machine_code.predicates import decide_both


@executes("DADD DMUL DFMA", "RM RP RZ")
def arithmetic(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """Of a, b and c: a + b, a · b or a · b + c. Directions of rounding, as at the end of a root, are ignored."""
    target, *operands = instruction.operands
    first, second, *third = (machine.double(operand).astype(np.longdouble) for operand in operands)
    value = first + second if instruction.name == "DADD" else first * second
    value = value + third[0] if third else value
    machine.write_pair(target, value.astype(np.float64).view(np.uint64), lanes)


@executes("DSETP", f"{ORDERS} AND OR")
def compare(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """A comparison and its opposite, each combined with a predicate."""
    left, right = (machine.double(operand) for operand in instruction.operands[2:4])
    decide_both(machine, instruction, is_ordered(instruction.modifiers[0], left, right), lanes)
