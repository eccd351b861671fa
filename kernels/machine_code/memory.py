"""A thread block's own memories: bounds, alignment, what was never written, and races between warps.

Addresses are [n] integers, one for each of a block's n threads, of which `active` [n] bool take part; an access has 1,
2, 4, 8 or 16 bytes. Bytes of a load are [n, size], zeros where an address is wrong.
"""

import numpy as np

from kernels.machine_code.findings import Findings
from kernels.machine_code.hazards import Hazards
from kernels.machine_code.listing import Instruction


class SharedMemory:
    """A block's shared memory.

    Attributes:
        size: bytes.
        start: address of the first.
        content: [size] uint8.
        hazards: between warps.
        undefined: [size] uint8, bits that were never written, or with a value that had none.
        is_unfenced: [size] bool: written, but not yet visible to a tensor core's own loads.
        is_arriving: [size] bool: written by an asynchronous copy that was not waited for.
    """

    def __init__(self, size: int, start: int, num_threads: int, findings: Findings) -> None:
        self.size = size
        self.start = start
        self.content = np.zeros(size, np.uint8)
        self.hazards = Hazards(size, num_threads)
        self.undefined = np.full(size, 0xFF, np.uint8)
        self.is_unfenced = np.zeros(size, bool)
        self.is_arriving = np.zeros(size, bool)
        self._copies: list[list[np.ndarray]] = [[]]
        self._findings = findings

    def start_copy(self, places: np.ndarray) -> None:
        """These bytes are written at some time until they are waited for."""
        self._copies[-1].append(places)
        self.is_arriving[places] = True

    def close_copies(self) -> None:
        """The copies since the last call are a group."""
        self._copies.append([])

    def wait_for_copies(self, left: int) -> None:
        """Until at most this many complete groups are under way."""
        self._copies = self._copies[-left - 1 :]
        self.is_arriving[:] = False
        for places in (places for group in self._copies for places in group):
            self.is_arriving[places] = True

    def load(
        self, instruction: Instruction, addresses: np.ndarray, size: int, active: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Bytes [n, size], and which bits of them are undefined."""
        loaded, undefined = np.zeros((2, len(addresses), size), np.uint8)
        places, active = self._places(instruction, addresses, size, active)
        if places is None:
            return loaded, undefined
        wrong = self.hazards.load(places, active)
        if wrong:
            self._findings.add(instruction, "race", wrong)
        if self.is_arriving[places].any():
            self._findings.add(instruction, "shared memory that a copy still writes")
        loaded[active], undefined[active] = self.content[places], self.undefined[places]
        return loaded, undefined

    def store(
        self,
        instruction: Instruction,
        addresses: np.ndarray,
        content: np.ndarray,
        undefined: np.ndarray,
        active: np.ndarray,
    ) -> np.ndarray | None:
        """Store bytes [n, size]; returns the places [lanes, size] written, or None."""
        places, active = self._places(instruction, addresses, content.shape[1], active)
        if places is None:
            return None
        wrong = self.hazards.store(places, active, instruction)
        if wrong:
            self._findings.add(instruction, "race", wrong)
        self.content[places], self.undefined[places] = content[active], undefined[active]
        self.is_unfenced[places] = True
        return places

    def _places(
        self, instruction: Instruction, addresses: np.ndarray, size: int, active: np.ndarray
    ) -> tuple[np.ndarray | None, np.ndarray]:
        """Bytes [lanes, size] of the active lanes with a right address, and which lanes these are, [n] bool."""
        at = addresses.astype(np.int64) - self.start
        inside = (at >= 0) & (at + size <= self.size)
        if (active & ~inside).any():
            wrong = at[active & ~inside]
            self._findings.add(
                instruction, "out of shared memory", f"{wrong.min()} … {wrong.max() + size} of {self.size} bytes"
            )
        if (at[active] % size).any():
            self._findings.add(instruction, "misaligned")
        active = active & inside
        if not active.any():
            return None, active
        return at[active][:, None] + np.arange(size), active


class LocalMemory:
    """Each thread's own stack, [n, size] bytes; it grows downwards from `size`."""

    def __init__(self, size: int, num_threads: int, findings: Findings) -> None:
        self.size = size
        self._content = np.zeros((num_threads, size), np.uint8)
        self._undefined = np.full((num_threads, size), 0xFF, np.uint8)
        self._findings = findings

    def load(
        self, instruction: Instruction, addresses: np.ndarray, size: int, active: np.ndarray, lowest: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Bytes [n, size], and which bits of them are undefined; `lowest` is the end of the stack."""
        threads, places = self._places(instruction, addresses, size, active, lowest)
        loaded, undefined = np.zeros((2, len(addresses), size), np.uint8)
        loaded[threads] = self._content[threads[:, None], places]
        undefined[threads] = self._undefined[threads[:, None], places]
        return loaded, undefined

    def store(
        self,
        instruction: Instruction,
        addresses: np.ndarray,
        content: np.ndarray,
        undefined: np.ndarray,
        active: np.ndarray,
        lowest: int,
    ) -> None:
        """Store bytes [n, size]."""
        threads, places = self._places(instruction, addresses, content.shape[1], active, lowest)
        self._content[threads[:, None], places] = content[threads]
        self._undefined[threads[:, None], places] = undefined[threads]

    def _places(
        self, instruction: Instruction, addresses: np.ndarray, size: int, active: np.ndarray, lowest: int
    ) -> tuple[np.ndarray, np.ndarray]:
        at = addresses.astype(np.int64)
        inside = (at >= lowest) & (at + size <= self.size)
        if (active & ~inside).any():
            self._findings.add(instruction, "out of the stack")
        if (at[active] % size).any():
            self._findings.add(instruction, "misaligned")
        threads = np.flatnonzero(active & inside)
        return threads, at[threads][:, None] + np.arange(size)
