"""Arithmetic and logic of integers."""

import functools
import itertools

import numpy as np

from kernels.machine_code.findings import UnknownInstructionError
from kernels.machine_code.listing import ZERO, Instruction, Operand
from kernels.machine_code.machine import Machine, executes
from kernels.machine_code.registers import joined

_LOW = np.uint64(0xFFFFFFFF)
_WORD = np.uint64(32)
_NOTHING = np.zeros(1, np.uint64)


@executes("IMAD UIMAD", "MOV U32 SHL IADD X WIDE HI")
def multiply_add(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """Of a · b + c the low 32 bits, all 64 (WIDE), or the high ones (HI); for the last two, c has 64 bits."""
    target, first, second, third, *carries = instruction.operands
    modifiers = instruction.modifiers
    if "WIDE" not in modifiers and "HI" not in modifiers:
        value = machine.whole(first) * machine.whole(second) + machine.whole(third)
        for carry in carries:
            value = value + machine.truth(carry)
        machine.write(target, value.astype(np.uint32), lanes, undefined=_undefined_product(machine, instruction))
        return
    if carries:
        raise UnknownInstructionError(f"unknown instruction {instruction}")
    if "U32" in modifiers:
        product = machine.whole(first).astype(np.uint64) * machine.whole(second)
    else:
        product = machine.signed(first).astype(np.int64) * machine.signed(second)
    total = product.view(np.uint64) + machine.pair(third)
    if "WIDE" in modifiers:
        machine.write_pair(target, total, lanes)
    else:
        machine.write(target, (total >> _WORD).astype(np.uint32), lanes)


def _undefined_product(machine: Machine, instruction: Instruction) -> np.ndarray | None:
    """Undefined bits of a register that is moved; or shifted to the left by a multiplication: those and all above."""
    _, first, second, third, *_ = instruction.operands
    if first.kind == second.kind == third.kind == "register" and first.row == second.row == ZERO:
        return machine.undefined[third.row]
    if (
        first.kind != "register"
        or second.kind != "number"
        or third.row != ZERO
        or not machine.undefined[first.row].any()
    ):
        return None
    shifted = machine.undefined[first.row] * (second.words[0] & ~second.words[0] + np.uint32(1))
    return ~(shifted - np.uint32(1) & ~shifted) & np.where(shifted, np.uint32(0xFFFFFFFF), np.uint32(0))


def _carries_out(instruction: Instruction) -> tuple[Operand, list[Operand], list[Operand]]:
    """The destination, predicates that get carries, and the other operands."""
    target, *rest = instruction.operands
    outputs = []
    while rest[0].kind == "predicate":
        outputs.append(rest.pop(0))
    return target, outputs, rest


@executes("IADD3 UIADD3", "X 64")
def add(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """Sums of three and of carries in; each carry out counts one 2³²."""
    target, outputs, rest = _carries_out(instruction)
    if "64" in instruction.modifiers:
        machine.write_pair(target, sum((machine.pair(operand) for operand in rest[:3]), start=_NOTHING), lanes)
        return
    total = sum((machine.addend(operand) for operand in rest[:3]), start=_NOTHING)
    for carry in rest[3:]:
        total = total + machine.truth(carry)
    machine.write(target, total.astype(np.uint32), lanes)
    for index, output in enumerate(outputs):
        machine.decide(output, total >> _WORD > index, lanes)


@executes("VIADD")
def add_two(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """Sums of two."""
    target, first, second = instruction.operands
    machine.write(target, machine.whole(first) + machine.whole(second), lanes)


@executes("LEA ULEA", "HI X SX32")
def scaled_add(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """(a << shift) + b, or with HI the high word of a pair, shifted, + b."""
    target, outputs, rest = _carries_out(instruction)
    first, second, *rest = rest
    value = machine.whole(first).astype(np.uint64)
    if "HI" in instruction.modifiers:
        if "SX32" in instruction.modifiers:
            value = machine.signed(first).astype(np.int64).view(np.uint64)
        else:
            value = joined(machine.whole(first), machine.whole(rest.pop(0)))
        shift, *carries = rest
        value = value << np.uint64(shift.row) >> _WORD
    else:
        shift, *carries = rest
        value = machine.bits(first).astype(np.uint64) if first.is_negative else value
        value = value << np.uint64(shift.row) & _LOW
        if first.is_negative:  # as in `Registers.addend`
            value = np.uint64(1 << 32) - value
    total = value + machine.addend(second)
    for carry in carries:
        total = total + machine.truth(carry)
    machine.write(target, total.astype(np.uint32), lanes)
    for output in outputs[:1]:
        machine.decide(output, total >> _WORD != 0, lanes)


@executes("SHF USHF", "L R U32 S32 U64 S64 HI")
def shift(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """The low or (HI) high word of a pair that is shifted; right shifts of 32 bits shift the high word alone."""
    target, low, count, high = instruction.operands
    by = machine.whole(count).astype(np.uint64)
    machine.settle(lanes)
    value, undefined = _shifted(instruction, machine.whole(low), machine.whole(high), by), np.zeros(1, np.uint32)
    if machine.doubt().any():  # bits that are shifted away do not matter
        undefined = _shifted(instruction, machine.unknown(low), machine.unknown(high), by)
    machine.write(target, value, lanes, undefined=undefined)


def _shifted(instruction: Instruction, low: np.ndarray, high: np.ndarray, by: np.ndarray) -> np.ndarray:
    modifiers, value = instruction.modifiers, joined(low, high)
    if "L" in modifiers:
        value = np.where(by < 64, value << (by & np.uint64(63)), np.uint64(0))
    elif "S64" in modifiers:
        value = (value.view(np.int64) >> np.minimum(by, 63).astype(np.int64)).view(np.uint64)
    elif "U64" in modifiers:
        value = np.where(by < 64, value >> (by & np.uint64(63)), np.uint64(0))
    elif "HI" not in modifiers:
        raise UnknownInstructionError(f"unknown instruction {instruction}")
    elif "S32" in modifiers:
        value = high.view(np.int32).astype(np.int64) >> np.minimum(by, 31).astype(np.int64)
        value = value.view(np.uint64) << _WORD
    else:
        value = np.where(by < 32, high >> (by & np.uint64(31)), np.uint64(0)) << _WORD
    return (value >> _WORD if "HI" in modifiers else value).astype(np.uint32)


@executes("LOP3 ULOP3", "LUT")
def logic(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """Any function of three bits, given as a table of eight; a predicate gets whether there is any bit."""
    operands, output = list(instruction.operands), None
    if operands[0].kind == "predicate":
        output = operands.pop(0)
    target, *inputs = operands
    sources, table = inputs[:3], inputs[3].row
    words = [machine.whole(operand) for operand in sources]
    value = _by_table(table, words)
    undefined = np.zeros(1, np.uint32)
    if machine.doubt().any():  # bits that are the same for any value of the undefined ones are defined
        unknown = list(map(machine.unknown, sources))
        for choice in itertools.product((False, True), repeat=3):
            other = [bits ^ mask if flip else bits for bits, mask, flip in zip(words, unknown, choice, strict=True)]
            undefined = undefined | value ^ _by_table(table, other)
    machine.write(target, value, lanes, undefined=undefined)
    if output is not None:
        machine.decide(output, value != 0, lanes, undefined != 0)


def _by_table(table: int, inputs: list[np.ndarray]) -> np.ndarray:
    value = np.zeros(1, np.uint32)
    for index in range(8):
        if table >> index & 1:
            first, second, third = (bits if index >> (2 - k) & 1 else ~bits for k, bits in enumerate(inputs))
            value = value | first & second & third
    return value


@executes("PRMT UPRMT")
def permute(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """Four of eight bytes, or their signs."""
    target, low, selector, high = instruction.operands
    chosen = machine.whole(selector)
    machine.settle(lanes)
    value, undefined = joined(machine.whole(low), machine.whole(high)), np.zeros(1, np.uint32)
    if machine.doubt().any():  # half of a register is replaced: the other one may never have had a value
        undefined = _permuted(joined(machine.unknown(low), machine.unknown(high)), chosen)
    machine.write(target, _permuted(value, chosen), lanes, undefined=undefined)


def _permuted(value: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    total = np.zeros(1, np.uint64)
    for index in range(4):
        place = chosen >> np.uint32(4 * index) & np.uint32(15)
        byte = value >> (place & np.uint32(7)).astype(np.uint64) * np.uint64(8) & np.uint64(255)
        byte = np.where(place & np.uint32(8), np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0)), byte)
        total = total | byte << np.uint64(8 * index)
    return total.astype(np.uint32)


@executes("POPC UPOPC")
def count_ones(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """How many bits are set."""
    target, source = instruction.operands
    machine.write(target, np.bitwise_count(machine.whole(source)).astype(np.uint32), lanes)


@executes("SGXT USGXT", "U32")
def extend(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """The low bits, extended by their sign or (U32) by zeros."""
    target, source, count = instruction.operands
    value, kept = machine.whole(source), np.uint32(count.row)
    if "U32" in instruction.modifiers:
        value = value & ((np.uint32(1) << kept) - np.uint32(1))
    else:
        value = ((value << (np.uint32(32) - kept)).view(np.int32) >> (np.int32(32) - np.int32(kept))).view(np.uint32)
    machine.write(target, value, lanes)


@executes("IMNMX UIMNMX VIMNMX VIADDMNMX VIMNMX3", "U32 RELU")
def extreme(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """The least if a predicate is true, else the greatest: of two, of a sum and a number, or of three."""
    target, *operands, condition = instruction.operands
    if "U32" in instruction.modifiers:
        values = [machine.whole(operand) for operand in operands]
    else:
        values = [machine.signed(operand) for operand in operands]
    if instruction.name == "VIADDMNMX":
        values = [values[0] + values[1], values[2]]
    least, greatest = functools.reduce(np.minimum, values), functools.reduce(np.maximum, values)
    value = np.where(machine.truth(condition), least, greatest)
    if "RELU" in instruction.modifiers:
        value = np.maximum(value, 0).astype(value.dtype)
    machine.write(target, value.view(np.uint32), lanes)
