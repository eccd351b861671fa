"""A thread block in execution: registers and predicates of all its threads, and which instruction each is at.

All threads that are at the same instruction execute it together; of several groups, the one that is furthest behind.
So warps are in step, which none may rely on: what a warp may see of another's work is checked by `memory`. Lanes that
went two ways wait for each other where the code says so, as do all threads at a barrier.
"""

import re
from collections.abc import Callable

import numpy as np

from kernels.machine_code.findings import Findings, UnknownInstructionError
from kernels.machine_code.listing import Instruction, Listing
from kernels.machine_code.memory import LocalMemory, SharedMemory
from kernels.machine_code.registers import WARP, Registers, by_warp, joined, of_warps
from kernels.machine_code.tensors import GlobalMemory

_STACK = 8192  # bytes a thread, more than any kernel here spills
_SCRATCH = 16  # bytes behind them: pointers that Triton's launcher adds
_MOST_STEPS = 400_000
# sm_80 leaves loops by calls, too; who calls has the address to return to in registers
_JUMPS = {("BRA", ()), ("CALL", ("REL", "NOINC"))}
_RETURN = ("RET", ("REL", "NODEC"))
_BARRIER = ("BAR", ("SYNC", "DEFER_BLOCKING"))
_MEETINGS = {(name, modifiers) for name in ("BSSY", "BSYNC", "BREAK") for modifiers in ((), ("RECONVERGENT",))}
_CONTROL = {*_JUMPS, *_MEETINGS, _RETURN, _BARRIER, ("EXIT", ())}

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
        nobody: [n] bool, none.
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
        super().__init__(num_threads, {0: constants, 2: listing.constants}, findings)
        self.block = block
        self.shared = SharedMemory(shared_bytes, listing.architecture.shared_start, num_threads, findings)
        self.local = LocalMemory(_STACK, num_threads, findings)
        self.memory = memory
        self.issued = np.zeros(len(listing.instructions), np.int64)
        self.wavefronts = np.zeros(len(listing.instructions), np.int64)
        self.lines = np.zeros(len(listing.instructions), np.int64)
        self.position = 0
        self.alive = self.everyone
        self.nobody = np.zeros(num_threads, bool)
        self._listing = listing
        self._handlers: dict[int, Handler] = {}  # by position
        self._num_warps = num_threads // WARP
        self._paths = {0: self.everyone}  # threads by position
        self._waiting: dict[int, np.ndarray] = {}  # threads that have got to a position where they wait for others
        self._together: dict[str, np.ndarray] = {}  # threads that meet again, by the name of the place

    def run(self) -> None:
        """Execute the block to its end.

        Raises:
            UnknownInstructionError: an instruction is not known.
        """
        steps = 0
        with np.errstate(all="ignore"):
            while self._paths or self._waiting:
                if not self._paths:
                    self._give_up_waiting()
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
        if (self.instruction.name, self.instruction.modifiers) in _CONTROL:
            self._go(self.position + 1, lanes & ~active | self._control(active))
            return
        if self.position not in self._handlers:
            self._handlers[self.position] = handler_of(self.instruction)
        if active is lanes or active.any():
            self._handlers[self.position](self, self.instruction, active)
        self._paths[self.position + 1] = self._joined(self.position + 1, lanes)

    def _control(self, active: np.ndarray) -> np.ndarray:
        """Execute an instruction that says where lanes go; returns those that go to the next one."""
        everyone = active
        for operand in self.instruction.operands:
            if operand.kind == "predicate":  # besides the instruction's own
                active = active & self.condition(operand, active)
        return everyone & ~active | self._going_on(active)

    def _going_on(self, active: np.ndarray) -> np.ndarray:
        """The same, for lanes whose conditions all hold."""
        instruction = self.instruction
        match instruction.name:
            case "EXIT":
                self.alive = self.alive & ~active
                self._look_again()
            case "BRA" | "CALL":
                self._go(self._listing.position[instruction.operands[-1].row], active)
            case "RET":
                self._return(active)
            case "BAR":
                if len(instruction.operands) != 1:  # for some of the block's threads
                    raise UnknownInstructionError(f"unknown instruction {instruction}")
                return self._meet(active, self.alive)
            case "BSSY":
                name = instruction.operands[0].text
                before = self._together.get(name, self.nobody)
                self._together[name] = np.where(of_warps(active), active, before)
                return active
            case "BREAK":
                name = instruction.operands[-1].text
                self._together[name] = self._together[name] & ~active
                self._look_again()
                return active
            case "BSYNC":
                together = self._together[instruction.operands[-1].text] & self.alive
                waiting = self._waiting.get(self.position, self.nobody) | active
                return self._meet(active, together & of_warps(waiting))
        return self.nobody

    def _meet(self, arrived: np.ndarray, expected: np.ndarray) -> np.ndarray:
        """Lanes [n] bool wait until all that are expected are here, at a barrier of the block or in their own warp."""
        waiting = self._waiting.pop(self.position, self.nobody) | arrived
        missing = expected & ~waiting
        is_of_block = self.instruction.name == "BAR"
        held = waiting & (missing.any() if is_of_block else of_warps(missing))
        if held.any():
            self._waiting[self.position] = held
        elif is_of_block:
            self.barrier()
        return waiting & ~held

    def _return(self, active: np.ndarray) -> None:
        """To where a pair of registers says."""
        text = self.instruction.operands[0].text
        found = re.fullmatch(r"R(\d+) 0x0", text)
        if found is None:
            raise UnknownInstructionError(f"unknown instruction {self.instruction}")
        low = int(found[1])
        if (self.undefined[low : low + 2, active] != 0).any():
            self.findings.add(self.instruction, "depends on an uninitialised register", text)
        addresses = joined(*self.registers[low : low + 2])
        for address in np.unique(addresses[active]):
            self._go(self._listing.position[int(address)], active & (addresses == address))

    def _look_again(self) -> None:
        """Some lanes have ended or left: others may no longer have to wait for them."""
        for position, lanes in self._waiting.items():
            self._go(position, lanes)
        self._waiting.clear()

    def _give_up_waiting(self) -> None:
        """Nobody else is left."""
        position = min(self._waiting)
        self.findings.add(self._listing.instructions[position], "waits for threads that do not come")
        self._go(position + 1, self._waiting.pop(position))

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
