"""Matrix products of tensor cores, and what is waited for."""

import re

import numpy as np

from kernels.machine_code.findings import UnknownInstructionError
from kernels.machine_code.floats import from_bf16
from kernels.machine_code.listing import ZERO, Instruction, Operand
from kernels.machine_code.machine import Machine, executes

_DEPTH = 16  # numbers of a row of the first matrix: 32 bytes
_GROUP = 128  # threads of a warp group
_ROW_BYTES = {1: 128, 2: 64, 3: 32}  # of a block of eight rows in shared memory, by the descriptor's last two bits
_SIGN = np.uint32(0xFFFF)


@executes("HGMMA", "64x8x16 64x16x16 64x32x16 64x64x16 64x128x16 64x256x16 F32 BF16")
def multiply_asynchronously(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """A warp group's product of [64, 16] and [16, N], added to its accumulator or not.

    The first matrix is in registers or in shared memory, the second in shared memory.
    """
    if instruction.modifiers[1:] != ("F32", "BF16") or not lanes.all():
        raise UnknownInstructionError(f"unknown instruction {instruction}")
    target, *rest = instruction.operands
    width = int(re.findall(r"^64x(\d+)x16$", instruction.modifiers[0])[0])
    left = rest.pop(0) if rest[0].kind == "register" else None
    place, addend, *rest = rest
    machine.products.results -= set(range(target.row, target.row + width // 2))  # products are added in order
    places = [_places(machine, instruction, place, 2, width, "tnspB")]
    right = _numbers(machine, instruction, places[0])
    if left is None:
        places.append(_places(machine, instruction, place, 0, 64, "tnspA"))
        first = _numbers(machine, instruction, places[1])
    else:
        first = _from_fragments(machine, left).reshape(-1, 64, _DEPTH)
    product = (first @ right.transpose(0, 2, 1)).reshape(-1, 16, width)
    if all(machine.truth(operand).all() for operand in rest if operand.kind == "predicate"):
        product = product + _accumulated(machine, addend, width)
    _accumulate(machine, target, product, lanes)
    operands = range(left.row, left.row + 4) if left is not None else range(0)
    read = np.unique(np.concatenate([each.reshape(-1) for each in places]))
    machine.products.start(range(target.row, target.row + width // 2), operands, read)
    if any(operand.text.startswith("gsb") for operand in rest):
        machine.products.close()


@executes("WARPGROUP", "ARRIVE DEPBAR LE")
def wait_for_products(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """Until at most a number of groups of products are running."""
    del lanes
    if "DEPBAR" in instruction.modifiers:
        machine.products.wait(instruction.operands[1].row)


@executes("HMMA", "16816 F32 BF16")
def multiply(machine: Machine, instruction: Instruction, lanes: np.ndarray) -> None:
    """A warp's product of [16, 16] and [16, 8], added to an accumulator, all in registers."""
    if instruction.modifiers != ("16816", "F32", "BF16"):
        raise UnknownInstructionError(f"unknown instruction {instruction}")
    target, left, right, addend = instruction.operands
    columns = np.stack([_pairs(machine, right, word) for word in range(2)], axis=2)  # [warps, 32, 2, 2]
    columns = columns.reshape(-1, 8, 4, 2, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 8, _DEPTH)
    product = _from_fragments(machine, left) @ columns.transpose(0, 2, 1)
    _accumulate(machine, target, product + _accumulated(machine, addend, 8), lanes)


def _pairs(machine: Machine, operand: Operand, word: int) -> np.ndarray:
    """[warps, 32, 2] numbers of a register; zeros of RZ."""
    bits = np.broadcast_to(machine.bits(operand, word), machine.threads.shape)
    pair = np.stack([from_bf16(bits & _SIGN), from_bf16(bits >> np.uint32(16))], axis=-1)
    return pair.reshape(-1, 32, 2)


def _from_fragments(machine: Machine, operand: Operand) -> np.ndarray:
    """[warps, 16, 16]: lane l has rows l // 4 and l // 4 + 8, columns 2 (l % 4), the next one, and those 8 behind."""
    words = np.stack([_pairs(machine, operand, word) for word in range(4)], axis=1)  # [warps, 4, 32, 2]
    words = words.reshape(-1, 2, 2, 8, 4, 2)  # columns' half, rows' half, row, pair of columns, column
    return words.transpose(0, 2, 3, 1, 4, 5).reshape(-1, 16, 16)


def _accumulated(machine: Machine, operand: Operand, width: int) -> np.ndarray:
    """[warps, 16, width] fp32 of registers, or a zero: as in `_from_fragments`, eight columns after eight."""
    if operand.row == ZERO:
        return np.zeros(1, np.float32)
    words = np.stack([machine.bits(operand, word) for word in range(width // 2)]).view(np.float32)
    words = words.reshape(width // 8, 2, 2, -1, 8, 4)  # eight columns, rows' half, column, warp, row, pair of columns
    return words.transpose(3, 1, 4, 0, 5, 2).reshape(-1, 16, width)


def _accumulate(machine: Machine, target: Operand, product: np.ndarray, lanes: np.ndarray) -> None:
    """The reverse."""
    machine.settle(lanes)
    width = product.shape[-1]
    words = product.reshape(-1, 2, 8, width // 8, 4, 2).transpose(3, 1, 5, 0, 2, 4)  # as above
    words = np.ascontiguousarray(words).reshape(width // 2, -1).astype(np.float32).view(np.uint32)
    for word in range(width // 2):
        machine.write(target, words[word], lanes, word)


def _places(
    machine: Machine, instruction: Instruction, operand: Operand, behind: int, rows: int, transposed: str
) -> np.ndarray:
    """[groups, rows, 16] places in shared memory of a matrix's numbers, as a descriptor of two registers says.

    Rows lie in blocks of eight, of 32 to 128 bytes each; transposed, the depth does. Within a block, units of 16 bytes
    change their places depending on the row.
    """
    name = Operand("register", operand.text, operand.row + behind)
    low, high = (machine.bits(name, word)[::_GROUP].astype(np.int64) for word in range(2))
    if machine.doubt().any():
        machine.findings.add(instruction, "uninitialised descriptor", f"of matrix {transposed[-1]}")
    start, leading, stride = ((bits & 0x3FFF) << 4 for bits in (low, low >> 16, high))
    row_bytes = [_ROW_BYTES.get(mode, 0) for mode in (high >> 30).tolist()]
    if len(set(row_bytes)) > 1 or not row_bytes[0] or (high >> 17 & 7).any():
        machine.findings.add(instruction, "descriptor", f"0x{low[0]:08x} 0x{high[0]:08x}")
        return np.zeros((len(low), rows, _DEPTH), np.int64)
    width = row_bytes[0]
    start, leading, stride = (value[:, None, None] for value in (start, leading, stride))
    row, depth = np.arange(rows)[:, None], np.arange(_DEPTH)
    if transposed in operand.part:
        unit = width // 2
        places = start + row // unit * leading + depth // 8 * stride + depth % 8 * width + row % unit * 2
    else:
        places = start + row // 8 * stride + row % 8 * width + depth * 2
    return (places ^ (places >> 7 & (width // 16 - 1)) << 4) - machine.shared.start


def _numbers(machine: Machine, instruction: Instruction, places: np.ndarray) -> np.ndarray:
    """[groups, rows, 16] numbers in shared memory."""
    shared = machine.shared
    inside = (places >= 0) & (places + 2 <= shared.size)
    if not inside.all():
        wrong = places[~inside]
        machine.findings.add(
            instruction, "out of shared memory", f"{wrong.min()} … {wrong.max() + 2} of {shared.size} bytes"
        )
    places = np.where(inside, places, 0)
    if shared.hazards.writers[places].any():
        by = shared.hazards.writer[places][shared.hazards.writers[places] != 0][0]
        machine.findings.add(instruction, "race", f"written at 0x{by:04x}, without a barrier between")
    elif shared.is_unfenced[places].any():
        machine.findings.add(instruction, "shared memory without a fence since it was written")
    if shared.undefined[places].any():
        machine.findings.add(instruction, "shared memory that was never written")
    shared.hazards.load_by_all(places)
    return from_bf16(shared.content[places].astype(np.uint32) | shared.content[places + 1].astype(np.uint32) << 8)
