"""Some thread blocks of a launch, executed: what is wrong with the code, and what a tile of the inner loop costs."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from kernels.machine_code import accesses, doubles, floats, integers, moves, predicates, products
from kernels.machine_code.findings import Findings
from kernels.machine_code.launch import Launch
from kernels.machine_code.listing import Listing
from kernels.machine_code.machine import Machine
from kernels.machine_code.registers import WARP
from kernels.machine_code.tensors import GlobalMemory

INSTRUCTION_SETS = (
    accesses,
    doubles,
    floats,
    integers,
    moves,
    predicates,
    products,
)  # importing them registers what they execute
_PRODUCTS = {"HGMMA", "HMMA"}


@dataclass(frozen=True)
class Counts:
    """Of one thread block.

    Attributes:
        tiles: passes of the innermost loops with matrix products.
        instructions: issued by a warp for each tile, what is outside of these loops divided among the tiles.
        instructions_in_loop: those in the loops.
        wavefronts: accesses of shared memory by all warps for each tile: by loads and stores, and by copies that arrive
            there, but not by the tensor cores' own reads.
        wavefronts_in_loop: those in the loops.
        lines: accesses of the L1 cache by all warps for each tile, by loads and stores of tensors and of the stack.
    """

    tiles: int
    instructions: float
    instructions_in_loop: float
    wavefronts: float
    wavefronts_in_loop: float
    lines: float


@dataclass(frozen=True)
class Emulation:
    """Results.

    Attributes:
        counts: of each block that was executed.
        findings: a line for each fault of an instruction.
    """

    counts: list[Counts] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)


def emulate(
    listing: Listing,
    launch: Launch,
    types: Mapping[str, str],
    shared_bytes: int,
    blocks: Iterable[tuple[int, int, int]],
    *,
    has_padding: bool = False,
) -> Emulation:
    """Execute thread blocks, one after the other; the launch's tensors get their results.

    Args:
        listing: the machine code, of exactly this kernel and its constants.
        launch: arguments.
        types: Triton type of each argument that is no constant.
        shared_bytes: of a block.
        blocks: coordinates in the grid.
        has_padding: whether it may access all of a storage, not only what tensors show of it.

    Raises:
        UnknownInstructionError: the code has an instruction that is not known.
    """
    findings, counts = Findings(), []
    num_threads = launch.num_warps * WARP
    tensors = {name: tensor for name, tensor in launch.tensors.items() if name in types}
    memory = GlobalMemory(tensors, num_threads, findings, has_padding=has_padding)
    parameters = launch.parameters(types, memory.pointers)
    for block in blocks:
        machine = Machine(listing, num_threads, shared_bytes, parameters, launch.grid, block, memory, findings)
        machine.run()
        memory.barrier()
        counts.append(_counts(listing, machine, launch.num_warps))
    return Emulation(counts, findings.lines())


def _counts(listing: Listing, machine: Machine, num_warps: int) -> Counts:
    loops = [loop for loop in listing.loops() if any(listing.instructions[index].name in _PRODUCTS for index in loop)]
    inside = np.zeros(len(listing.instructions), bool)
    for loop in loops:
        inside[loop] = True
    tiles = int(sum(machine.issued[loop[0]] for loop in loops)) // num_warps
    issued = machine.issued / num_warps / max(tiles, 1)
    wavefronts, lines = machine.wavefronts / max(tiles, 1), machine.lines / max(tiles, 1)
    each = (issued, issued[inside], wavefronts, wavefronts[inside], lines)
    return Counts(tiles, *(float(counts.sum()) for counts in each))
