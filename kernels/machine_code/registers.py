"""The registers of a thread block: operands and results of instructions, and which of their bits have a value."""

from collections.abc import Mapping

import numpy as np

from kernels.machine_code.findings import Findings, UnknownInstructionError
from kernels.machine_code.listing import TRUE, UNIFORM, UNIFORM_PREDICATE, ZERO, Instruction, Operand
from kernels.machine_code.running import RunningProducts

WARP = 32
_FACTORS = {part: np.uint64(factor) for part, factor in {"": 1, "64": 1, "X4": 4, "X8": 8, "X16": 16}.items()}
_NONE = np.zeros(1, bool)
_ALL = np.uint32(0xFFFFFFFF)


class Registers:
    """Registers and predicates of a block's n threads, and what an instruction reads and writes of them.

    Attributes:
        everyone: [n] bool, all of them.
        threads: [n] uint32, 0 … n − 1.
        registers: [rows, n] uint32; see `listing`.
        predicates: [rows, n] bool.
        undefined: [rows, n] uint32, bits of registers that have never had a value, or were computed from such ones.
        is_undecided: the same of predicates, [rows, n] bool.
        products: matrix products that have been started and not waited for.
        instruction: in execution.
        findings: what was wrong.
    """

    def __init__(self, num_threads: int, constants: Mapping[int, bytes], findings: Findings) -> None:
        self.everyone = np.ones(num_threads, bool)
        self.threads = np.arange(num_threads, dtype=np.uint32)
        self.registers = np.zeros((ZERO + 1, num_threads), np.uint32)
        self.predicates = np.zeros((TRUE + 1, num_threads), bool)
        self.predicates[7] = self.predicates[TRUE] = True
        self.undefined = np.full(self.registers.shape, _ALL)
        self.undefined[ZERO] = 0
        self.is_undecided = np.zeros(self.predicates.shape, bool)
        self.products = RunningProducts()
        self.instruction = Instruction(0, "NOP")
        self.findings = findings
        self._doubtful = set(range(ZERO))  # rows of registers with undefined bits
        self._doubt = _NONE  # lanes for which the instruction has read undefined bits
        self._constants = {bank: np.frombuffer(content, np.uint32) for bank, content in constants.items()}

    def start(self, instruction: Instruction, lanes: np.ndarray) -> np.ndarray:
        """The next instruction for lanes [n] bool; returns those that execute it."""
        self.instruction, self._doubt = instruction, _NONE
        if instruction.predicate is None:
            return lanes
        active = lanes & self.condition(instruction.predicate, lanes)
        self._doubt = _NONE
        return active

    def bits(self, operand: Operand, word: int = 0) -> np.ndarray:
        """[n] or [1] uint32, as stored, without a sign; of the operand's register, or of one behind it."""
        if operand.kind == "register":
            row = operand.row if operand.row == ZERO else operand.row + word
            if row in self._doubtful:
                self._doubt = self._doubt | (self.undefined[row] != 0)
            if row in self.products.results:
                self.findings.add(self.instruction, "reads a result of a running product", f"R{row}")
            return self.registers[row]
        if operand.kind == "constant":
            constants, place = self._constants[operand.bank], operand.row // 4 + word
            if place >= len(constants):
                raise UnknownInstructionError(f"no such constant: {self.instruction}")
            return constants[place : place + 1]
        if operand.kind == "number":
            return operand.words[word]
        raise UnknownInstructionError(f"unknown operand {operand.text} of {self.instruction}")

    def unknown(self, operand: Operand, word: int = 0) -> np.ndarray:
        """[n] or [1] uint32, which of `bits` have no value; only registers have such."""
        if operand.kind != "register" or operand.row == ZERO:
            return np.zeros(1, np.uint32)
        return self.undefined[operand.row + word]

    def whole(self, operand: Operand) -> np.ndarray:
        """uint32, with its sign or inversion."""
        bits = self.bits(operand)
        if operand.is_negative:
            return ~bits + np.uint32(1)
        return ~bits if operand.is_inverted else bits

    def signed(self, operand: Operand) -> np.ndarray:
        """The same as int32."""
        return self.whole(operand).view(np.int32)

    def addend(self, operand: Operand) -> np.ndarray:
        """The same as uint64, for sums whose carry counts: −x is 2³² − x, also where x is 0."""
        if operand.is_negative:
            return np.uint64(1 << 32) - self.bits(operand).astype(np.uint64)
        return self.whole(operand).astype(np.uint64)

    def pair(self, operand: Operand) -> np.ndarray:
        """uint64 of two registers."""
        value = joined(self.bits(operand), self.bits(operand, 1))
        return ~value + np.uint64(1) if operand.is_negative else value

    def fraction(self, operand: Operand) -> np.ndarray:
        """float32, with its sign."""
        if operand.part:
            raise UnknownInstructionError(f"unknown operand {operand.text} of {self.instruction}")
        value = self.bits(operand).view(np.float32)
        if operand.is_absolute:
            value = np.abs(value)
        return -value if operand.is_negative else value

    def double(self, operand: Operand) -> np.ndarray:
        """float64 of two registers, with its sign."""
        if operand.fraction is not None:
            value = np.full(1, operand.fraction)
        else:
            value = joined(self.bits(operand), self.bits(operand, 1)).view(np.float64)
        if operand.is_absolute:
            value = np.abs(value)
        return -value if operand.is_negative else value

    def truth(self, operand: Operand) -> np.ndarray:
        """[n] bool of a predicate."""
        if operand.kind != "predicate":
            raise UnknownInstructionError(f"no predicate: {self.instruction}")
        if self.is_undecided[operand.row].any():
            self._doubt = self._doubt | self.is_undecided[operand.row]
        value = self.predicates[operand.row]
        return ~value if operand.is_inverted else value

    def condition(self, operand: Operand, lanes: np.ndarray) -> np.ndarray:
        """The same, of one that decides what is executed."""
        if (self.is_undecided[operand.row] & lanes).any():
            self.findings.add(self.instruction, "depends on an uninitialised register", operand.text)
        return self.truth(operand)

    def place(self, operand: Operand, lanes: np.ndarray) -> np.ndarray:
        """[n] uint64, an address."""
        is_wide = any(term.part == "64" for term in operand.terms)
        total = np.full(len(self.threads), operand.offset & 0xFFFFFFFFFFFFFFFF, np.uint64)
        for term in operand.terms:
            if term.kind != "register" or term.part not in _FACTORS:
                raise UnknownInstructionError(f"unknown address {operand.text} of {self.instruction}")
            value = self.pair(term) if term.part == "64" else self.bits(term).astype(np.uint64)
            total = total + value * _FACTORS[term.part]
        self.settle(lanes)
        return total if is_wide else total & np.uint64(0xFFFFFFFF)

    def settle(self, lanes: np.ndarray) -> None:
        """Whatever was read must have had a value."""
        if self._doubt is not _NONE and (self._doubt & lanes).any():
            self.findings.add(self.instruction, "uninitialised register")
        self._doubt = _NONE

    def doubt(self) -> np.ndarray:
        """[n] or [1] bool: whether something that was read had no value; it counts no longer."""
        doubt, self._doubt = self._doubt, _NONE
        return doubt

    def write(
        self,
        operand: Operand,
        value: np.ndarray,
        lanes: np.ndarray,
        word: int = 0,
        undefined: np.ndarray | None = None,
    ) -> None:
        """Store uint32, [n] or [1], in a register or one behind it.

        `undefined` are the bits without a value; by default all, if anything that the instruction has read has any.
        """
        if operand.kind != "register":
            raise UnknownInstructionError(f"no destination: {self.instruction}")
        if operand.row == ZERO:
            return
        row = operand.row + word
        if self.products.results or self.products.operands:
            if row in self.products.results:
                self.findings.add(self.instruction, "writes a result of a running product", f"R{row}")
            if row in self.products.operands:
                self.findings.add(self.instruction, "writes an operand of a running product", f"R{row}")
        if row >= UNIFORM and lanes is not self.everyone:
            lanes = of_warps(lanes)
        np.copyto(self.registers[row], value, where=lanes)
        if undefined is None:
            undefined = np.zeros((), np.uint32) if self._doubt is _NONE else np.where(self._doubt, _ALL, np.uint32(0))
        if row in self._doubtful or undefined.any():
            np.copyto(self.undefined[row], undefined, where=lanes)
            (self._doubtful.add if self.undefined[row].any() else self._doubtful.discard)(row)

    def write_pair(self, operand: Operand, value: np.ndarray, lanes: np.ndarray) -> None:
        """Store uint64 in two registers."""
        self.write(operand, value.astype(np.uint32), lanes)
        self.write(operand, (value >> np.uint64(32)).astype(np.uint32), lanes, 1)

    def decide(
        self, operand: Operand, value: np.ndarray, lanes: np.ndarray, undefined: np.ndarray | None = None
    ) -> None:
        """Store bool in a predicate; `undefined`, if it is not known, as in `write`."""
        if operand.row not in {7, TRUE}:
            if operand.row >= UNIFORM_PREDICATE and lanes is not self.everyone:
                lanes = of_warps(lanes)
            np.copyto(self.predicates[operand.row], value, where=lanes)
            np.copyto(self.is_undecided[operand.row], self._doubt if undefined is None else undefined, where=lanes)


def joined(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """uint64 of two uint32."""
    return low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)


def by_warp(values: np.ndarray) -> np.ndarray:
    """[n] as [warps, 32]."""
    return values.reshape(-1, WARP)


def of_warps(lanes: np.ndarray) -> np.ndarray:
    """[n] bool: all lanes of the warps of which any is in `lanes`. A warp has one of each uniform register."""
    return np.repeat(by_warp(lanes).any(axis=1), WARP)
