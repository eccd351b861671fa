"""A kernel's machine code as text, taken apart into instructions and operands."""

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

# Rows of the machine's register file: R0 … R254, then UR0 … UR62 (of which each warp has one), and one that is always
# zero, for RZ and URZ. Of its predicates: P0 … P6, UP0 … UP6, and one that is always true, for PT and UPT.
UNIFORM, ZERO = 256, 320
UNIFORM_PREDICATE, TRUE = 8, 15


class Architecture(NamedTuple):
    """What differs between generations.

    Attributes:
        parameters: where arguments begin in the constant memory.
        shared_start: bytes of a block's shared memory before its own: the first kilobyte may be the system's.
    """

    parameters: int
    shared_start: int


AMPERE, HOPPER = Architecture(0x160, 0), Architecture(0x210, 1024)
ARCHITECTURES = {"sm_80": AMPERE, "sm_86": AMPERE, "sm_89": AMPERE, "sm_90": HOPPER}

Kind = Literal["register", "predicate", "constant", "number", "address", "descriptor", "other"]


@dataclass(frozen=True)
class Operand:
    """An operand.

    Attributes:
        kind: what it is; "address" is in square brackets, "descriptor" names registers with a matrix's place.
        text: as in the listing.
        row: of a register or predicate in the machine's files; of a constant: its byte; of a number: its 64 bits.
        bank: of a constant: 0 has the launch's sizes and arguments, 2 numbers of the code.
        is_negative: −x of a number, or of a register as a number.
        is_inverted: ~x, or ! of a predicate.
        is_absolute: |x|.
        part: of a register, such as "H0_H0" or "B1"; "64" is a pair of registers; of a descriptor: what is transposed.
        terms: registers of an address, whose sum with `offset` it is.
        offset: bytes.
        fraction: of a number that is no integer, its value; `row` has its bits in fp32.
    """

    kind: Kind
    text: str
    row: int = 0
    is_negative: bool = False
    is_inverted: bool = False
    is_absolute: bool = False
    part: str = ""
    terms: tuple["Operand", ...] = ()
    offset: int = 0
    fraction: float | None = None
    bank: int = 0

    @cached_property
    def words(self) -> tuple[np.ndarray, np.ndarray]:
        """Low and high 32 bits of a number, [1] each."""
        low, high = (np.full(1, self.row >> shift & 0xFFFFFFFF, np.uint32) for shift in (0, 32))
        return low, high


@dataclass(frozen=True)
class Instruction:
    """An instruction.

    Attributes:
        address: in bytes.
        name: of the operation, such as "IMAD".
        modifiers: such as ("WIDE", "U32").
        operands: destinations first.
        predicate: that a lane must have to execute it, or None.
        text: as in the listing, with single spaces.
    """

    address: int
    name: str
    modifiers: tuple[str, ...] = ()
    operands: tuple[Operand, ...] = ()
    predicate: Operand | None = None
    text: str = ""

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Listing:
    """The instructions of one kernel, in order.

    Attributes:
        instructions: all of them.
        position: of an address among them.
        architecture: for which it was compiled.
        constants: bank 2 of the constant memory.
    """

    instructions: tuple[Instruction, ...]
    position: dict[int, int] = field(default_factory=dict)
    architecture: Architecture = HOPPER
    constants: bytes = b""

    @classmethod
    def parse(cls, text: str, constants: bytes = b"") -> "Listing":
        """The listing that `cuobjdump -sass` prints of a file with one kernel; for sm_90, if it does not say."""
        target = re.search(r"^\s*code for (sm_\d+)", text, re.MULTILINE)
        architecture = HOPPER if target is None else ARCHITECTURES[target[1]]
        instructions = tuple(found for line in text.splitlines() if (found := _instruction(line)) is not None)
        positions = {instruction.address: index for index, instruction in enumerate(instructions)}
        return cls(instructions, positions, architecture, constants)

    def loops(self) -> list[range]:
        """Positions of the instructions of each innermost loop: from a branch's target up to a branch backwards."""
        loops = []
        for index, instruction in enumerate(self.instructions):
            if instruction.name == "BRA":
                start = self.position[instruction.operands[-1].row]
                if start < index:  # one to itself, behind the end, is none
                    loops.append(range(start, index + 1))
        return [
            loop
            for loop in loops
            if not any(other != loop and other[0] >= loop[0] and other[-1] <= loop[-1] for other in loops)
        ]


def _instruction(line: str) -> Instruction | None:
    line = re.sub(r"\s*/\* 0x[0-9a-f]+ \*/\s*$", "", line).strip()
    found = re.fullmatch(r"/\*([0-9a-f]{4,5})\*/\s+(?:@(!?U?P[0-9T]+)\s+)?([\w.]+)\s*(.*?)\s*;", line)
    if found is None:
        return None
    address, predicate, name, rest = found.groups()
    name, *modifiers = name.split(".")
    operands = tuple(_operand(part.strip()) for part in re.split(r",(?![^\[]*\])", rest)) if rest else ()
    return Instruction(
        int(address, 16),
        name,
        tuple(modifiers),
        operands,
        _operand(predicate) if predicate else None,
        " ".join(line.split()),
    )


def _operand(text: str) -> Operand:
    bare = text.replace(".reuse", "").replace(" ", "")
    for pattern, make in _KINDS:
        found = re.fullmatch(pattern, bare)
        if found is not None:
            return make(text, found)
    return Operand("other", text)


def _register(text: str, found: re.Match[str]) -> Operand:
    sign, bars, uniform, number, part = found.groups()
    row = ZERO if number == "Z" else int(number) + (UNIFORM if uniform else 0)
    return Operand("register", text, row, sign == "-", sign == "~", bool(bars), part or "")


def _predicate(text: str, found: re.Match[str]) -> Operand:
    inverted, uniform, number = found.groups()
    row = TRUE if number == "T" else int(number) + (UNIFORM_PREDICATE if uniform else 0)
    return Operand("predicate", text, row, is_inverted=bool(inverted))


def _constant(text: str, found: re.Match[str]) -> Operand:
    sign, bank, offset = found.groups()
    return Operand("constant", text, int(offset, 0), is_negative=sign == "-", is_inverted=sign == "~", bank=int(bank))


def _whole(text: str, found: re.Match[str]) -> Operand:
    return Operand("number", text, int(found[0], 16) & 0xFFFFFFFFFFFFFFFF)


def _fraction(text: str, found: re.Match[str]) -> Operand:
    """Numbers that are not hexadecimal are of floating-point operations."""
    value = float(found[0].replace("QNAN", "nan"))
    with np.errstate(over="ignore"):  # of a double
        return Operand("number", text, int(np.float32(value).view(np.uint32)), fraction=value)


def _address(text: str, found: re.Match[str]) -> Operand:
    terms, offset = [], 0
    for part in re.findall(r"[^+]+", found[1]):
        if re.fullmatch(r"-?0x[0-9a-f]+", part):
            offset += int(part, 16)
        else:
            terms.append(_operand(part))
    return Operand("address", text, terms=tuple(terms), offset=offset)


def _descriptor(text: str, found: re.Match[str]) -> Operand:
    return Operand("descriptor", text, int(found[1]) + UNIFORM, part=found[2])


_KINDS = (
    (r"([-~]?)(\|?)(U?)R(\d+|Z)\|?(?:\.(\w+))?", _register),
    (r"(!?)(U?)P(\d|T)", _predicate),
    (r"([-~]?)c\[0x([02])\]\[(0x[0-9a-f]+)\]", _constant),
    (r"-?0x[0-9a-f]+", _whole),
    (r"[+-]?(?:\d+\.?\d*(?:e[+-]?\d+)?|INF|QNAN)", _fraction),
    (r"gdesc\[UR(\d+)\]((?:\.\w+)*)", _descriptor),
    (r"(?:desc\[UR\d+\])?\[(.*)\]", _address),
)
