"""Loads, stores, copies, barriers and fences."""

import numpy as np

from kernels.machine_code.listing import Instruction, Operand
from kernels.machine_code.machine import Machine, executes
from kernels.machine_code.registers import by_warp
from kernels.machine_code.wavefronts import WORD, lines, wavefronts

_SIZES = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
_STACK_POINTER = 1


def _size(instruction: Instruction) -> int:
    return next((_SIZES[name] for name in instruction.modifiers if name in _SIZES), 4)


def _count_wavefronts(machine: Machine, addresses: np.ndarray, size: int, lanes: np.ndarray) -> None:
    machine.wavefronts[machine.position] += wavefronts(addresses, size, lanes)


def _count_lines(machine: Machine, addresses: np.ndarray, size: int, lanes: np.ndarray) -> None:
    machine.lines[machine.position] += lines(np.broadcast_to(addresses, lanes.shape), size, lanes)


def _count_local(machine: Machine, size: int, lanes: np.ndarray) -> None:
    """The same word of a warp's stacks is one line."""
    machine.lines[machine.position] += by_warp(lanes).any(axis=1).sum() * max(size // WORD, 1)


def _receive(
    machine: Machine,
    instruction: Instruction,
    target: Operand,
    loaded: tuple[np.ndarray, np.ndarray],
    lanes: np.ndarray,
) -> None:
    """Store bytes [n, size] and their undefined bits in registers; short ones are extended."""
    content, undefined = (_words(bits, instruction) for bits in loaded)
    for word in range(content.shape[1]):
        machine.write(target, content[:, word], lanes, word, undefined[:, word])


def _words(content: np.ndarray, instruction: Instruction) -> np.ndarray:
    """[n, words] uint32 of bytes."""
    size = content.shape[1]
    if size >= 4:
        return np.ascontiguousarray(content).view(np.uint32)
    value = content @ (np.uint32(1) << np.arange(0, 8 * size, 8, dtype=np.uint32))
    if {"S16", "S8"}.intersection(instruction.modifiers):
        shift = np.int32(32 - 8 * size)
        value = (value.astype(np.uint32) << np.uint32(shift)).view(np.int32) >> shift
    return value.astype(np.uint32)[:, None]


def _sent(machine: Machine, source: Operand, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Bytes [n, size] of registers, and their undefined bits."""
    content, undefined = np.empty((2, len(machine.threads), -(-size // 4)), np.uint32)
    for word in range(content.shape[1]):
        content[:, word] = machine.bits(source, word)
        undefined[:, word] = machine.unknown(source, word)
    machine.doubt()
    return content.view(np.uint8)[:, :size], undefined.view(np.uint8)[:, :size]


def _store_shared(
    machine: Machine,
    instruction: Instruction,
    addresses: np.ndarray,
    sent: tuple[np.ndarray, np.ndarray],
    lanes: np.ndarray,
) -> np.ndarray | None:
    _count_wavefronts(machine, addresses, sent[0].shape[1], lanes)
    places = machine.shared.store(instruction, addresses, *sent, lanes)
    if places is not None and machine.products.reads(places):
        machine.findings.add(instruction, "writes what a running product reads")
    return places


@executes("LDS", "128 64 U16 S16 U8 S8")
def load_shared(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """From the block's shared memory."""
    target, source = instruction.operands
    addresses, size = machine.place(source, lanes), _size(instruction)
    _count_wavefronts(machine, addresses, size, lanes)
    _receive(machine, instruction, target, machine.shared.load(instruction, addresses, size, lanes), lanes)


@executes("STS", "128 64 U16 U8")
def store_shared(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """To the block's shared memory."""
    target, source = instruction.operands
    addresses = machine.place(target, lanes)
    _store_shared(machine, instruction, addresses, _sent(machine, source, _size(instruction)), lanes)


@executes("LDL", "128 64 U16 S16 U8 S8 LU")
def load_local(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """From the thread's stack."""
    target, source = instruction.operands
    addresses, lowest = machine.place(source, lanes), int(machine.registers[_STACK_POINTER, 0])
    _count_local(machine, _size(instruction), lanes)
    loaded = machine.local.load(instruction, addresses, _size(instruction), lanes, lowest)
    _receive(machine, instruction, target, loaded, lanes)


@executes("STL", "128 64 U16 U8")
def store_local(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """To the thread's stack."""
    target, source = instruction.operands
    addresses, lowest = machine.place(target, lanes), int(machine.registers[_STACK_POINTER, 0])
    _count_local(machine, _size(instruction), lanes)
    machine.local.store(instruction, addresses, *_sent(machine, source, _size(instruction)), lanes, lowest)


@executes("LDG", "E 128 64 U16 S16 U8 S8 CONSTANT EF EL LTC128B LTC64B")
def load_global(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """From a tensor."""
    target, source = instruction.operands
    addresses, size = machine.place(source, lanes), _size(instruction)
    _count_lines(machine, addresses, size, lanes)
    content = machine.memory.load(instruction, addresses, size, lanes)
    _receive(machine, instruction, target, (content, np.zeros_like(content)), lanes)


@executes("STG", "E 128 64 U16 U8 EF EL")
def store_global(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """To a tensor."""
    target, source = instruction.operands
    addresses, (content, undefined) = machine.place(target, lanes), _sent(machine, source, _size(instruction))
    if undefined[lanes].any():
        machine.findings.add(instruction, "uninitialised register")
    _count_lines(machine, addresses, content.shape[1], lanes)
    machine.memory.store(instruction, addresses, content, lanes)


@executes("LDGSTS", "E BYPASS LTC128B 128 64")
def copy(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """From a tensor to shared memory, on its own; zeros where a predicate is false."""
    target, source, *conditions = instruction.operands
    size, reading = _size(instruction), lanes
    for condition in conditions:
        reading = reading & machine.truth(condition)
    content = np.zeros((len(lanes), size), np.uint8)
    if reading.any():
        addresses = machine.place(source, reading)
        _count_lines(machine, addresses, size, reading)
        content = machine.memory.load(instruction, addresses, size, reading)
    sent = content, np.zeros_like(content)
    places = _store_shared(machine, instruction, machine.place(target, lanes), sent, lanes)
    if places is not None:
        machine.shared.start_copy(places)


@executes("LDGDEPBAR")
def close_copies(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """The copies so far are a group."""
    del instruction, lanes
    machine.shared.close_copies()


@executes("DEPBAR", "LE")
def wait_for_copies(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """Until at most a number of groups of copies are under way."""
    del lanes
    machine.shared.wait_for_copies(instruction.operands[1].row)


@executes("LDSM STSM", "16 M88 MT88 1 2 4")
def access_matrices(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """One, two or four matrices of 8 × 8 numbers of two bytes; eight lanes each have the address of a row.

    Lane l has the two numbers of row l // 4 and columns 2 (l % 4) and 2 (l % 4) + 1, with MT88 of the transposed one.
    """
    is_load = instruction.name == "LDSM"
    register, memory = instruction.operands if is_load else instruction.operands[::-1]
    last, num_warps = instruction.modifiers[-1], len(lanes) // 32
    count = int(last) if last.isdigit() else 1
    addresses = machine.place(memory, lanes)
    giving = lanes & (machine.threads % 32 < 8 * count)
    lane = np.arange(32)
    row, column = lane[:, None] // 4, 2 * (lane[:, None] % 4) + np.arange(2)
    if "MT88" in instruction.modifiers:
        row, column = column, row
    if is_load:
        _count_wavefronts(machine, addresses, 16, giving)
        content, undefined = (
            bits.view(np.uint16).reshape(num_warps, 4, 8, 8)
            for bits in machine.shared.load(instruction, addresses, 16, giving)
        )
        for index in range(count):
            words, unknown = (
                np.ascontiguousarray(bits[:, index][:, row, column]).view(np.uint32).reshape(-1)
                for bits in (content, undefined)
            )
            machine.write(register, words, lanes, index, unknown)
        return
    sent = _sent(machine, register, 4 * count)
    rows = np.zeros((2, num_warps, 4, 8, 8), np.uint16)
    for matrices, bits in zip(rows, sent, strict=True):
        for index in range(count):
            words = np.ascontiguousarray(bits[:, 4 * index : 4 * index + 4])
            matrices[:, index, row, column] = words.view(np.uint16).reshape(num_warps, 32, 2)
    stored, doubts = rows.reshape(2, -1, 8).view(np.uint8)
    _store_shared(machine, instruction, addresses, (stored, doubts), giving)


@executes("FENCE", "VIEW ASYNC S")
def fence(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """What was written to shared memory is visible to loads of tensor cores."""
    del instruction, lanes
    machine.shared.is_unfenced[:] = False


@executes("MEMBAR NOP ERRBAR CCTL WARPSYNC", "ALL CTA GPU SC IVALL")
def nothing(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """Order of accesses that is kept here in any case."""
    del machine, instruction, lanes
