"""Triton's kernels on the stand-in for a GPU: the machine code that the driver got, executed when its turn comes."""

import ctypes
import sys

import numpy as np

from kernels.machine_code import emulation  # noqa: F401 - registers the instructions
from kernels.machine_code.cubin import constants, disassemble
from kernels.machine_code.findings import Findings, UnknownInstructionError
from kernels.machine_code.listing import Listing
from kernels.machine_code.machine import Machine
from tests.stand_in.operations import LIBRARY, executing

LIBRARY.stand_in_name.restype = ctypes.c_char_p
LIBRARY.stand_in_name.argtypes = [ctypes.c_void_p]
LIBRARY.stand_in_file.restype = ctypes.c_void_p
LIBRARY.stand_in_file.argtypes = [ctypes.c_void_p, ctypes.c_void_p]

_listings: dict[int, Listing] = {}  # by function
_said: set[str] = set()


class DeviceMemory:
    """All memory of the device, as `kernels.machine_code.tensors.GlobalMemory` is that of a launch's tensors."""

    def __init__(self, findings: Findings) -> None:
        count = LIBRARY.stand_in_memory(None, None, 0)
        starts, sizes = ((ctypes.c_ulonglong * count)() for _ in range(2))
        LIBRARY.stand_in_memory(starts, sizes, count)
        self._starts = np.array(starts, np.uint64)
        self._areas = [
            np.frombuffer((ctypes.c_uint8 * size).from_address(start), np.uint8)
            for start, size in zip(starts, sizes, strict=True)
        ]
        self._findings = findings

    def load(self, instruction, addresses, size, active):
        """Bytes [n, size]."""
        loaded = np.zeros((len(addresses), size), np.uint8)
        for area, places, lanes in self._places(instruction, addresses, size, active):
            loaded[lanes] = area[places]
        return loaded

    def store(self, instruction, addresses, content, active):
        """Store bytes [n, size]."""
        for area, places, lanes in self._places(instruction, addresses, content.shape[1], active):
            area[places] = content[lanes]

    def barrier(self):
        """Nothing: races are looked for where a kernel is alone, by `kernels.machine_code`."""

    def _places(self, instruction, addresses, size, active):
        if (addresses[active] % np.uint64(size)).any():
            self._findings.add(instruction, "misaligned")
        areas = np.searchsorted(self._starts, addresses, "right") - 1
        for index in np.unique(areas[active]):
            lanes = active & (areas == index)
            at = addresses.astype(np.int64) - np.int64(self._starts[index])
            inside = (index >= 0) & (at >= 0) & (at + size <= len(self._areas[index]))
            if (lanes & ~inside).any():
                self._findings.add(instruction, "out of the device's memory", hex(addresses[lanes & ~inside][0]))
            lanes = lanes & inside
            if lanes.any():
                yield self._areas[index], at[lanes][:, None] + np.arange(size), lanes


def install() -> None:
    """Execute what is launched through the driver."""
    LIBRARY.stand_in_set_launched(_run)


@ctypes.CFUNCTYPE(
    None,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_uint,
    ctypes.c_uint,
    ctypes.c_void_p,
    ctypes.c_size_t,
)
def _run(function, grid, num_threads, shared_bytes, parameters, size):
    name = LIBRARY.stand_in_name(function).decode()
    with executing(name):
        if function not in _listings:
            length = ctypes.c_size_t()
            cubin = ctypes.string_at(LIBRARY.stand_in_file(function, ctypes.byref(length)), length.value)
            _listings[function] = Listing.parse(disassemble(cubin), constants(cubin))
        findings = Findings()
        memory, packed = DeviceMemory(findings), ctypes.string_at(parameters, size)
        x, y, z = grid[:3]
        try:
            for block in ((i, j, k) for k in range(z) for j in range(y) for i in range(x)):
                arguments = (num_threads, shared_bytes, packed, (x, y, z), block, memory, findings)
                Machine(_listings[function], *arguments).run()
        except UnknownInstructionError as error:
            _say(f"{name}: {error}; its result is wrong")
        for finding in findings.lines():
            _say(f"{name}: {finding}")


def _say(line: str) -> None:
    if line not in _said:
        _said.add(line)
        print(f"stand-in: {line}", file=sys.stderr)
