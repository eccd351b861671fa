"""Operations on floating-point numbers, computed as such: results are right up to the last bit of fp32 or bf16."""

from collections.abc import Callable

import numpy as np

from kernels.machine_code.findings import UnknownInstructionError
from kernels.machine_code.listing import Instruction
from kernels.machine_code.machine import Machine, executes
from kernels.machine_code.moves import chosen
from kernels.machine_code.predicates import COMPARISONS, decide_both

_UNORDERED = {f"{name}U" for name in COMPARISONS}  # true also if one is no number
_FUNCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "EX2": np.exp2,
    "LG2": np.log2,
    "RCP": np.reciprocal,
    "RSQ": lambda value: 1 / np.sqrt(value),
    "SQRT": np.sqrt,
}


def to_bf16(value: np.ndarray) -> np.ndarray:
    """bf16 bits of fp32 numbers, uint32: rounded to the nearest, ties to even."""
    bits = value.astype(np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)) >> np.uint32(16)
    return np.where(np.isnan(value), np.uint32(0x7FFF), rounded)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """fp32 numbers of bf16 bits, the low half of uint32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


@executes("FMUL FADD FFMA", "FTZ")
def arithmetic(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """Of a, b and c: a · b, a + b or a · b + c, rounded once (FFMA: almost always)."""
    operands = instruction.operands[1:]
    first, second, *third = (machine.fraction(operand).astype(np.float64) for operand in operands)
    value = first + second if instruction.name == "FADD" else first * second
    value = value + third[0] if third else value
    _write(machine, instruction, value, lanes)


@executes("FSEL")
def select(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """The first where a predicate is true, else the second."""
    target, first, second, condition = instruction.operands
    values = machine.fraction(first), machine.fraction(second)
    value, undefined = chosen(machine, condition, *values, (first, second))
    machine.write(target, value.view(np.uint32), lanes, undefined=undefined)


@executes("FMNMX", "FTZ")
def extreme(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """The lesser if a predicate is true, else the greater; of a number and none, the number."""
    first, second = (machine.fraction(operand) for operand in instruction.operands[1:3])
    condition = instruction.operands[3]
    value = np.where(machine.truth(condition), np.fmin(first, second), np.fmax(first, second))
    _write(machine, instruction, value, lanes)


@executes("MUFU", " ".join(_FUNCTIONS))
def function(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """An elementary function."""
    value = machine.fraction(instruction.operands[1])
    _write(machine, instruction, _FUNCTIONS[instruction.modifiers[0]](value), lanes)


@executes("FSETP", " ".join([*COMPARISONS, *_UNORDERED, "AND", "OR", "FTZ"]))
def compare(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """A comparison and its opposite, each combined with a predicate."""
    name = instruction.modifiers[0]
    left, right = (machine.fraction(operand) for operand in instruction.operands[2:4])
    is_none = np.isnan(left) | np.isnan(right)
    holds = COMPARISONS[name.removesuffix("U")](left, right)
    holds = holds | is_none if name.endswith("U") else holds & ~is_none
    decide_both(machine, instruction, holds, lanes)


@executes("F2FP", "BF16 F32 PACK_AB")
def pack(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """Two fp32 numbers as bf16: the first in the high half."""
    target, *sources = instruction.operands
    high, low = (to_bf16(machine.fraction(operand)) for operand in sources)
    machine.write(target, high << np.uint32(16) | low, lanes)


@executes("F2F", "BF16 F32")
def narrow(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """One fp32 number as bf16, in the low half."""
    if instruction.modifiers != ("BF16", "F32"):
        raise UnknownInstructionError(f"unknown instruction {instruction}")
    target, source = instruction.operands
    machine.write(target, to_bf16(machine.fraction(source)), lanes)


@executes("HADD2 HFMA2", "BF16_V2")
def add_halves(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """Sums of two bf16 numbers each; on sm_80 as a · 1 + b."""
    if instruction.modifiers != ("BF16_V2",):
        raise UnknownInstructionError(f"unknown instruction {instruction}")
    target, *operands = instruction.operands
    if instruction.name == "HFMA2" and [operand.text for operand in operands[1:3]] == ["1", "1"]:
        del operands[1:3]
    if len(operands) > 2 or any(operand.part or operand.is_negative or operand.is_absolute for operand in operands):
        raise UnknownInstructionError(f"unknown instruction {instruction}")
    first, second = (machine.bits(operand) for operand in operands)
    halves = [
        to_bf16(from_bf16(first >> by & np.uint32(0xFFFF)) + from_bf16(second >> by & np.uint32(0xFFFF)))
        for by in (np.uint32(0), np.uint32(16))
    ]
    machine.write(target, halves[0] | halves[1] << np.uint32(16), lanes)


@executes("I2F I2FP", "F32 S32 U32")
def from_whole(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """An integer as fp32."""
    source = instruction.operands[1]
    is_signed = "U32" not in instruction.modifiers
    _write(machine, instruction, machine.signed(source) if is_signed else machine.whole(source), lanes)


def _write(machine: Machine, instruction: Instruction, value: np.ndarray, lanes: np.ndarray) -> None:
    machine.write(instruction.operands[0], value.astype(np.float32).view(np.uint32), lanes)
