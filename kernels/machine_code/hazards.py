"""Which warps access which bytes of a memory between two barriers."""

import numpy as np

from kernels.machine_code.listing import Instruction


class Hazards:
    """Which warps have read and written each byte since the block's last barrier; one warp's accesses are in order.

    Attributes:
        readers: [size] uint32, a bit for each warp.
        writers: the same.
        writer: [size] int32, address of the instruction that wrote last.
    """

    def __init__(self, size: int, num_threads: int) -> None:
        self.readers = np.zeros(size, np.uint32)
        self.writers = np.zeros(size, np.uint32)
        self.writer = np.zeros(size, np.int32)
        self._bits = np.uint32(1) << (np.arange(num_threads, dtype=np.uint32) // np.uint32(32))
        self._touched: list[np.ndarray] = []

    def load(self, places: np.ndarray, active: np.ndarray) -> str:
        """Note that bytes [lanes, size] are read; returns what is wrong with that, or nothing."""
        return self._access(places, active, self.readers, ((self.writers, "written by another warp"),))

    def store(self, places: np.ndarray, active: np.ndarray, instruction: Instruction) -> str:
        """The same for writing."""
        others = ((self.writers, "written by another warp"), (self.readers, "read by another warp"))
        wrong = self._access(places, active, self.writers, others)
        self.writer[places] = instruction.address
        return wrong

    def load_by_all(self, places: np.ndarray) -> None:
        """All warps read these bytes."""
        self.readers[places] = 0xFFFFFFFF
        self._touched.append(places)

    def barrier(self) -> None:
        """All warps have reached a barrier."""
        for places in self._touched:
            self.readers[places] = 0
            self.writers[places] = 0
        self._touched.clear()

    def _access(
        self,
        places: np.ndarray,
        active: np.ndarray,
        noted: np.ndarray,
        others: tuple[tuple[np.ndarray, str], ...],
    ) -> str:
        bits = self._bits[active]
        wrong = ""
        for masks, how in others:
            foreign = (masks[places] & ~bits[:, None]) != 0
            if foreign.any():
                at = f" at 0x{self.writer[places[foreign][0]]:04x}" if masks is self.writers else ""
                wrong = f"{how}{at}, without a barrier between"
        for bit in np.unique(bits):
            noted[places[bits == bit]] |= bit
        self._touched.append(places)
        return wrong
