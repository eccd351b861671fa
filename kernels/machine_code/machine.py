"""A thread block in execution: registers and predicates of all its threads, and which instruction each is at.

All threads that are at the same instruction execute it together; of several groups, the one that is furthest behind.
So warps are in step, which none may rely on: what a warp may see of another's work is checked by `memory`.
"""

from collections.abc import Callable

import numpy as np

from kernels.machine_code.findings import Findings, UnknownInstructionError
from kernels.machine_code.listing import Instruction, Listing
from kernels.machine_code.memory import LocalMemory, SharedMemory
from kernels.machine_code.registers import WARP, Registers, by_warp
from kernels.machine_code.tensors import GlobalMemory

_STACK = 8192  # bytes a thread, more than any kernel here spills
_SCRATCH = 16  # bytes behind them: pointers that Triton's launcher adds
_MOST_STEPS = 400_000
# sm_80 leaves loops by calls; none returns, since RET is not known
_JUMPS = {("BRA", ()), ("CALL", ("REL", "NOINC"))}

Handler = Callable[["Machine", Instruction, np.ndarray], None]
HANDLERS: dict[str, tuple[Handler, frozenset[str]]] = {}


def executes(names: str, modifiers: str = "") -> Callable[[Handler], Handler]:
    """Decorator: a function executes the operations of these names, with any of these modifiers.

    It gets the machine, the instruction and the lanes that execute it, [n] bool.
    """

    def register(handler: Handler) -> Handler:
        for name in names.split():
            HANDLERS[name] = handler, frozenset(modifiers.split())
        return handler

    return register


def handler_of(instruction: Instruction) -> Handler:
    """The function that executes an instruction.

    Raises:
        UnknownInstructionError: none does, or not with these modifiers.
    """
    handler, modifiers = HANDLERS.get(instruction.name, (None, frozenset()))
    if handler is None or not modifiers.issuperset(instruction.modifiers):
        raise UnknownInstructionError(f"unknown instruction {instruction}")
    return handler


class Machine(Registers):
    """One thread block of a launch; n threads.

    Attributes:
        block: coordinates in the grid.
        shared: the block's shared memory.
        local: the threads' stacks.
        memory: the launch's tensors.
        issued: [instructions] int64: how many warps executed each.
        wavefronts: [instructions] int64: accesses of shared memory by each.
        lines: [instructions] int64: accesses of the L1 cache by each.
        position: of the instruction in execution.
        alive: [n] bool, threads that have not ended.
    """

    def __init__(
        self,
        listing: Listing,
        num_threads: int,
        shared_bytes: int,
        parameters: bytes,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        memory: GlobalMemory,
        findings: Findings,
    ) -> None:
        constants = _constant_memory(num_threads, grid, listing.architecture.parameters, parameters)
        super().__init__(num_threads, constants, findings)
        self.block = block
        self.shared = SharedMemory(shared_bytes, listing.architecture.shared_start, num_threads, findings)
        self.local = LocalMemory(_STACK, num_threads, findings)
        self.memory = memory
        self.issued = np.zeros(len(listing.instructions), np.int64)
        self.wavefronts = np.zeros(len(listing.instructions), np.int64)
        self.lines = np.zeros(len(listing.instructions), np.int64)
        self.position = 0
        self.alive = self.everyone
        self._listing = listing
        self._handlers: dict[int, Handler] = {}  # by position
        self._num_warps = num_threads // WARP
        self._paths = {0: self.everyone}  # threads by position

    def run(self) -> None:
        """Execute the block to its end.

        Raises:
            UnknownInstructionError: an instruction is not known.
        """
        steps = 0
        with np.errstate(all="ignore"):
            while self._paths:
                self.position = min(self._paths)
                lanes = self._paths.pop(self.position)
                active = self.start(self._listing.instructions[self.position], lanes)
                steps += 1
                if steps > _MOST_STEPS:
                    self.findings.add(self.instruction, "no end", f"after {steps} instructions")
                    return
                is_whole = lanes is self.everyone
                self.issued[self.position] += self._num_warps if is_whole else by_warp(lanes).any(axis=1).sum()
                self._advance(lanes, active)

    def _advance(self, lanes: np.ndarray, active: np.ndarray) -> None:
        """Execute the instruction for the active lanes, and send all of them on."""
        instruction = self.instruction
        if instruction.name == "EXIT":
            self.alive = self.alive & ~active
            self._go(self.position + 1, lanes & ~active)
        elif (instruction.name, instruction.modifiers) in _JUMPS:
            for operand in instruction.operands[:-1]:
                active = active & self.condition(operand, active)
            self._go(self._listing.position[instruction.operands[-1].row], active)
            self._go(self.position + 1, lanes & ~active)
        else:
            if self.position not in self._handlers:
                self._handlers[self.position] = handler_of(instruction)
            if active is lanes or active.any():
                self._handlers[self.position](self, instruction, active)
            self._paths[self.position + 1] = self._joined(self.position + 1, lanes)

    def _go(self, position: int, lanes: np.ndarray) -> None:
        if lanes.any():
            self._paths[position] = self._joined(position, self.everyone if lanes.all() else lanes)

    def _joined(self, position: int, lanes: np.ndarray) -> np.ndarray:
        if position not in self._paths:
            return lanes
        lanes = lanes | self._paths[position]
        return self.everyone if lanes.all() else lanes

    def barrier(self) -> None:
        """All threads have reached a barrier: each may see what the others have written."""
        self.shared.hazards.barrier()
        self.memory.barrier()


def _constant_memory(num_threads: int, grid: tuple[int, int, int], start: int, parameters: bytes) -> bytes:
    """Sizes of block and grid, the stack's top, and at `start` the arguments; the rest is 0."""
    header = np.zeros(start // 4, np.uint32)
    header[:6] = (num_threads, 1, 1, *grid)
    header[0x28 // 4] = _STACK
    return header.tobytes() + parameters + bytes(-len(parameters) % 8 + _SCRATCH)
