"""What is wrong with a kernel's machine code: each instruction's faults, once each."""

from dataclasses import dataclass, field

from kernels.machine_code.listing import Instruction


class UnknownInstructionError(Exception):
    """The machine does not know an instruction, so nothing can be said about the code; the message is one line."""


@dataclass
class Findings:
    """Faults by instruction and kind.

    Attributes:
        texts: the first of each.
    """

    texts: dict[tuple[int, str], str] = field(default_factory=dict)

    def add(self, instruction: Instruction, kind: str, details: str = "") -> None:
        """Add a fault, such as "race"."""
        text = f"{kind}: {instruction}" + (f" ({details})" if details else "")
        self.texts.setdefault((instruction.address, kind), text)

    def lines(self) -> list[str]:
        """One line each, in the order of the code."""
        return [text for _, text in sorted(self.texts.items())]
