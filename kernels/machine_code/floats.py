"""Operations on fp32, bf16 and fp16, computed as such: results are right up to the last bit."""

from collections.abc import Callable

import numpy as np

from kernels.machine_code.findings import UnknownInstructionError
from kernels.machine_code.listing import ZERO, Instruction, Operand
from kernels.machine_code.machine import Machine, executes
from kernels.machine_code.moves import chosen
from kernels.machine_code.predicates import COMPARISONS, decide_both
from kernels.machine_code.registers import joined

_UNORDERED = {f"{name}U" for name in COMPARISONS}  # true also if one is no number
ORDERS = " ".join([*COMPARISONS, *_UNORDERED, "NAN", "NUM"])
_HALF = np.uint32(0xFFFF)
_WORD = np.uint32(16)
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


def to_fp16(value: np.ndarray) -> np.ndarray:
    """fp16 bits of numbers, uint32."""
    return value.astype(np.float16).view(np.uint16).astype(np.uint32)


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


@executes("FMNMX", "FTZ NAN")
def extreme(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """The lesser if a predicate is true, else the greater; of a number and none, the number, or with NAN none."""
    first, second = (machine.fraction(operand) for operand in instruction.operands[1:3])
    condition = instruction.operands[3]
    least, greatest = (np.minimum, np.maximum) if "NAN" in instruction.modifiers else (np.fmin, np.fmax)
    value = np.where(machine.truth(condition), least(first, second), greatest(first, second))
    _write(machine, instruction, value, lanes)


@executes("MUFU", " ".join([*_FUNCTIONS, "RCP64H", "RSQ64H"]))
def function(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """An elementary function; 64H: of doubles, from the high word alone to the high word alone."""
    target, source = instruction.operands
    name = instruction.modifiers[0]
    if name.endswith("64H"):
        value = _FUNCTIONS[name.removesuffix("64H")](
            joined(np.zeros(1, np.uint32), machine.bits(source)).view(np.float64)
        )
        machine.write(target, (value.view(np.uint64) >> np.uint64(32)).astype(np.uint32), lanes)
    else:
        _write(machine, instruction, _FUNCTIONS[name](machine.fraction(source)), lanes)


@executes("FSETP", f"{ORDERS} AND OR FTZ")
def compare(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """A comparison and its opposite, each combined with a predicate."""
    left, right = (machine.fraction(operand) for operand in instruction.operands[2:4])
    decide_both(machine, instruction, is_ordered(instruction.modifiers[0], left, right), lanes)


def is_ordered(name: str, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Whether a comparison of `ORDERS` holds; with NaN only those that end with U, and NAN."""
    is_none = np.isnan(left) | np.isnan(right)
    if name in {"NAN", "NUM"}:
        return is_none if name == "NAN" else ~is_none
    holds = COMPARISONS[name.removesuffix("U")](left, right)
    return holds | is_none if name.endswith("U") else holds & ~is_none


@executes("F2FP", "BF16 F16 F32 PACK_AB")
def pack(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """Two fp32 numbers as bf16 or fp16: the first in the high half."""
    target, *sources = instruction.operands
    narrow = to_bf16 if "BF16" in instruction.modifiers else to_fp16
    high, low = (narrow(machine.fraction(operand)) for operand in sources)
    machine.write(target, high << _WORD | low, lanes)


@executes("F2F", "BF16 F32 F64")
def convert(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """From fp32 to bf16, in the low half, or to fp64; or back from that."""
    target, source = instruction.operands
    match instruction.modifiers:
        case ("BF16", "F32"):
            machine.write(target, to_bf16(machine.fraction(source)), lanes)
        case ("F64", "F32"):
            machine.write_pair(target, machine.fraction(source).astype(np.float64).view(np.uint64), lanes)
        case ("F32", "F64"):
            _write(machine, instruction, machine.double(source), lanes)
        case _:
            raise UnknownInstructionError(f"unknown instruction {instruction}")


@executes("HADD2 HFMA2", "BF16_V2 F32 MMA")
def halves(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """Sums of two bf16 numbers each; an fp16 number widened, as −0 + it; two fp16 constants, as 0 · 0 + them."""
    target, *operands = instruction.operands
    if instruction.name == "HADD2" and instruction.modifiers == ("F32",) and operands[0].text == "-RZ":
        value = _half(machine, operands[1]).astype(np.float32)
        machine.write(target, value.view(np.uint32), lanes)
    elif instruction.name == "HFMA2" and instruction.modifiers in {(), ("MMA",)} and _is_constant(operands):
        high, low = (to_fp16(np.full(1, operand.fraction)) for operand in operands[2:])
        machine.write(target, high << _WORD | low, lanes)
    elif instruction.modifiers == ("BF16_V2",):
        _add_halves(machine, instruction, lanes)
    else:
        raise UnknownInstructionError(f"unknown instruction {instruction}")


def _half(machine: Machine, operand: Operand) -> np.ndarray:
    """fp16 numbers of one half of a register."""
    if operand.part not in {"H0_H0", "H1_H1"} or operand.is_absolute:
        raise UnknownInstructionError(f"unknown operand {operand.text} of {machine.instruction}")
    shifted = machine.bits(operand) >> (_WORD if operand.part == "H1_H1" else np.uint32(0))
    value = (shifted & _HALF).astype(np.uint16).view(np.float16)
    return -value if operand.is_negative else value


def _is_constant(operands: list[Operand]) -> bool:
    return all(operand.row == ZERO for operand in operands[:2]) and all(
        operand.fraction is not None for operand in operands[2:]
    )


def _add_halves(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """On sm_80 as a · 1 + b."""
    target, *operands = instruction.operands
    if instruction.name == "HFMA2" and [operand.text for operand in operands[1:3]] == ["1", "1"]:
        del operands[1:3]
    if len(operands) > 2 or any(operand.part or operand.is_negative or operand.is_absolute for operand in operands):
        raise UnknownInstructionError(f"unknown instruction {instruction}")
    first, second = (machine.bits(operand) for operand in operands)
    low, high = (
        to_bf16(from_bf16(first >> by & _HALF) + from_bf16(second >> by & _HALF)) for by in (np.uint32(0), _WORD)
    )
    machine.write(target, low | high << _WORD, lanes)


@executes("I2F I2FP", "F32 S32 U32 U64 RP")
def from_whole(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """An integer as fp32, rounded to the nearest or (RP) up."""
    ways = {"U32": machine.whole, "U64": machine.pair}
    read = next((way for name, way in ways.items() if name in instruction.modifiers), machine.signed)
    exact = read(instruction.operands[1]).astype(np.longdouble)
    value = exact.astype(np.float32)
    if "RP" in instruction.modifiers:
        value = np.where(value < exact, np.nextafter(value, np.float32(np.inf)), value)
    _write(machine, instruction, value, lanes)


@executes("F2I", "FTZ U32 U64 TRUNC NTZ")
def to_whole(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """An fp32 number as an unsigned integer, rounded towards zero; those out of range as the nearest, NaN as 0."""
    target, source = instruction.operands
    if "TRUNC" not in instruction.modifiers or not {"U32", "U64"}.intersection(instruction.modifiers):
        raise UnknownInstructionError(f"unknown instruction {instruction}")
    size = 64 if "U64" in instruction.modifiers else 32
    value = np.nan_to_num(np.trunc(machine.fraction(source)), nan=0).astype(np.float64)
    is_large = value >= 2.0**size
    whole = np.where(is_large | (value < 0), 0, value).astype(np.uint64)
    whole = np.where(is_large, np.uint64((1 << size) - 1), whole)
    if size == 64:
        machine.write_pair(target, whole, lanes)
    else:
        machine.write(target, whole.astype(np.uint32), lanes)


def _write(machine: Machine, instruction: Instruction, value: np.ndarray, lanes: np.ndarray) -> None:
    machine.write(instruction.operands[0], value.astype(np.float32).view(np.uint32), lanes)
