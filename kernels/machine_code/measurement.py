"""What the machine code of one inspected configuration says: costs of a tile, and faults."""

import subprocess
from dataclasses import dataclass, field

from kernels.configuration import Configuration
from kernels.machine_code.cubin import constants, disassemble
from kernels.machine_code.emulation import Counts, emulate
from kernels.machine_code.examples import example
from kernels.machine_code.findings import UnknownInstructionError
from kernels.machine_code.listing import Listing


@dataclass(frozen=True)
class Measurement:
    """Results.

    Attributes:
        counts: of a tile, or None.
        findings: faults of the code, one line each.
        note: why there are no counts, or None.
    """

    counts: Counts | None = None
    findings: list[str] = field(default_factory=list)
    note: str | None = None


def measure(configuration: Configuration, cubin: bytes, shared_bytes: int) -> Measurement | None:
    """Emulate some thread blocks of a launch of a configuration; None for operations without an example.

    Args:
        configuration: what was compiled, for one of `listing.ARCHITECTURES`.
        cubin: the result.
        shared_bytes: of a program.
    """
    try:
        launched = example(configuration)
    except ValueError as error:
        return Measurement(findings=[f"not emulated: {error}"])
    if launched is None:
        return None
    try:
        listing = Listing.parse(disassemble(cubin), constants(cubin))
        result = emulate(listing, launched.launch, configuration.types, shared_bytes, launched.blocks)
    except (UnknownInstructionError, OSError, subprocess.CalledProcessError) as error:
        return Measurement(note=f"no counts from machine code: {error}")
    return Measurement(result.counts[0], result.findings)
