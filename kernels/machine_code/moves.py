"""Values that are moved: between registers, lanes, and from what the hardware knows."""

from typing import Any

import numpy as np

from kernels.machine_code.findings import UnknownInstructionError
from kernels.machine_code.listing import ZERO, Instruction, Operand
from kernels.machine_code.machine import Machine, executes
from kernels.machine_code.registers import WARP, by_warp

_ALL = np.uint32(0xFFFFFFFF)


@executes("SEL USEL")
def select(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """The first where a predicate is true, else the second."""
    target, first, second, condition = instruction.operands
    value, undefined = chosen(machine, condition, machine.whole(first), machine.whole(second), (first, second))
    machine.write(target, value, lanes, undefined=undefined)


def chosen(
    machine: Machine, condition: Operand, first: np.ndarray, second: np.ndarray, sources: tuple[Operand, Operand]
) -> tuple[np.ndarray, np.ndarray]:
    """Values where a predicate is true, else others, and their undefined bits; those not chosen do not matter."""
    doubt, truth = machine.doubt(), machine.truth(condition)
    undecided = machine.doubt()
    undefined = np.zeros(1, np.uint32)
    if doubt.any() or undecided.any():
        undefined = np.where(undecided, _ALL, np.where(truth, *map(machine.unknown, sources)))
    return np.where(truth, first, second), undefined


@executes("MOV UMOV LDC ULDC", "64")
def move(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """A register, number or constant, or two of them."""
    target, source = instruction.operands
    for word in range(2 if "64" in instruction.modifiers else 1):
        machine.write(target, machine.bits(source, word), lanes, word, machine.unknown(source, word))
        machine.doubt()


@executes("CS2R", "32")
def clear(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """Zeros in two registers; of special registers, only the one that is zero is known."""
    target, source = instruction.operands
    if source.text != "SRZ":
        raise UnknownInstructionError(f"unknown instruction {instruction}")
    for word in range(1 if "32" in instruction.modifiers else 2):
        machine.write(target, np.zeros(1, np.uint32), lanes, word)


@executes("S2R S2UR")
def special(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """Coordinates of thread and block; the block's place in its cluster, 0."""
    target, source = instruction.operands
    names: dict[str, Any] = dict(zip(("SR_CTAID.X", "SR_CTAID.Y", "SR_CTAID.Z"), machine.block, strict=True))
    names |= {"SR_TID.X": machine.threads, "SR_LANEID": machine.threads % np.uint32(32), "SR_CgaCtaId": 0}
    if source.text not in names:
        raise UnknownInstructionError(f"unknown instruction {instruction}")
    machine.write(target, np.atleast_1d(np.asarray(names[source.text], np.uint32)), lanes)


@executes("R2UR")
def to_uniform(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """A register whose lanes are all the same, once for the warp."""
    target, source = instruction.operands
    values, active = by_warp(machine.bits(source)), by_warp(lanes)
    first = np.take_along_axis(values, active.argmax(axis=1)[:, None], axis=1)
    if ((values != first) & active).any():
        machine.findings.add(instruction, "lanes of a warp disagree")
    machine.write(target, np.repeat(first, WARP), lanes, undefined=_of_any(machine, lanes))


@executes("SHFL", "BFLY IDX UP DOWN")
def exchange(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """Another lane's register, and whether there is such a lane; else the own one."""
    is_there, target, source, place, clamp = instruction.operands
    if clamp.row != (ZERO if "UP" in instruction.modifiers else WARP - 1):
        raise UnknownInstructionError(f"unknown instruction {instruction}")
    lane = (machine.threads % np.uint32(WARP)).astype(np.int64)
    given = np.broadcast_to(machine.whole(place), machine.threads.shape).astype(np.int64) % WARP
    machine.settle(lanes)
    ways = {"BFLY": lane ^ given, "IDX": given, "UP": lane - given, "DOWN": lane + given}
    where = ways[instruction.modifiers[0]]
    is_inside = (where >= 0) & (where < WARP)
    where = np.where(is_inside, where, lane)
    others = np.take_along_axis(by_warp(lanes), by_warp(where), 1).reshape(-1)
    if (lanes & ~others).any():
        machine.findings.add(instruction, "a lane that takes no part")
    value, undefined = (
        np.take_along_axis(by_warp(bits), by_warp(where), 1).reshape(-1)
        for bits in (np.broadcast_to(machine.bits(source), lanes.shape), machine.undefined[source.row])
    )
    machine.doubt()
    machine.write(target, value, lanes, undefined=undefined)
    machine.decide(is_there, is_inside, lanes)


@executes("REDUX", "MIN MAX SUM S32")
def reduce(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """The least or greatest of a warp's lanes, or their sum."""
    if "S32" not in instruction.modifiers:
        raise UnknownInstructionError(f"unknown instruction {instruction}")
    target, source = instruction.operands
    limits = np.iinfo(np.int32)
    reduction, neutral = {
        "MIN": (np.minimum, limits.max),
        "MAX": (np.maximum, limits.min),
        "SUM": (np.add, 0),
    }[instruction.modifiers[0]]
    values = np.where(lanes, machine.signed(source), np.int32(neutral))
    value = reduction.reduce(by_warp(values), axis=1, dtype=np.int32)
    machine.write(target, np.repeat(value.view(np.uint32), WARP), lanes, undefined=_of_any(machine, lanes))


@executes("VOTEU", "ANY")
def vote(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """Whether a predicate is true for any lane of the warp."""
    target, condition = instruction.operands
    holds = by_warp(machine.truth(condition) & lanes).any(axis=1)
    is_undecided = by_warp(machine.doubt() & lanes).any(axis=1)
    machine.decide(target, np.repeat(holds, WARP), lanes, np.repeat(is_undecided, WARP))


def _of_any(machine: Machine, lanes: np.ndarray) -> np.ndarray:
    """Undefined bits of a value that a warp has in common."""
    is_undefined = by_warp(machine.doubt() & lanes).any(axis=1)
    return np.repeat(np.where(is_undefined, _ALL, np.uint32(0)), WARP)
