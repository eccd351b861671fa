"""Global memory: the tensors of a launch. Addresses and accesses are as in `memory`."""

import gc
from collections.abc import Mapping
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from kernels.machine_code.findings import Findings
from kernels.machine_code.hazards import Hazards
from kernels.machine_code.listing import Instruction

_GAP = 64 << 20  # bytes between tensors: an address that leaves one does not lie in the next
_FIRST = 0x100000000000  # below the addresses of this process, which tables of pointers have


class _Area(NamedTuple):
    """Memory of one or several tensors.

    Attributes:
        names: arguments of the launch.
        start: address of the first byte.
        content: [size] uint8.
        is_inside: [size] bool, what belongs to the tensors.
        hazards: between warps.
    """

    names: str
    start: int
    content: np.ndarray
    is_inside: np.ndarray
    hazards: Hazards


class GlobalMemory:
    """The tensors of a launch, each at an address of its own, far from the others; stores change the tensors.

    A tensor may hold addresses of others, as this process has them. Those are found among the tensors that are alive.

    Attributes:
        pointers: address of each tensor's first element.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], num_threads: int, findings: Findings, *, has_padding: bool = False
    ) -> None:
        storages: dict[int, list[tuple[str, Tensor]]] = {}
        for name, tensor in tensors.items():
            storages.setdefault(tensor.untyped_storage().data_ptr(), []).append((name, tensor))
        self.pointers: dict[str, int] = {}
        self._areas: list[_Area] = []
        self._num_threads = num_threads
        self._findings = findings
        start = _FIRST
        for members in storages.values():
            names = " or ".join(name for name, _ in members)
            size = self._add(names, start, members[0][1])
            for name, tensor in members:
                self.pointers[name] = start + int(tensor.storage_offset()) * tensor.element_size()
            if not has_padding:
                self._areas[-1].is_inside[:] = _is_inside([tensor for _, tensor in members], size)
            start += (size + _GAP) // 512 * 512
        self._starts = np.array([area.start for area in self._areas] + [start], np.uint64)

    def _add(self, names: str, start: int, tensor: Tensor) -> int:
        """Add the whole storage of a tensor, at an address; returns its size in bytes."""
        content = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()
        everything, hazards = np.ones(len(content), bool), Hazards(len(content), self._num_threads)
        self._areas.append(_Area(names, start, content, everything, hazards))
        return len(content)

    def load(self, instruction: Instruction, addresses: np.ndarray, size: int, active: np.ndarray) -> np.ndarray:
        """Bytes [n, size]."""
        loaded = np.zeros((len(addresses), size), np.uint8)
        for content, hazards, places, lanes in self._places(instruction, addresses, size, active):
            loaded[lanes] = content[places]
            wrong = hazards.load(places, lanes)
            if wrong:
                self._findings.add(instruction, "race in global memory", wrong)
        return loaded

    def store(self, instruction: Instruction, addresses: np.ndarray, content: np.ndarray, active: np.ndarray) -> None:
        """Store bytes [n, size]."""
        for area, hazards, places, lanes in self._places(instruction, addresses, content.shape[1], active):
            area[places] = content[lanes]
            wrong = hazards.store(places, lanes, instruction)
            if wrong:
                self._findings.add(instruction, "race in global memory", wrong)

    def barrier(self) -> None:
        """All warps have reached a barrier."""
        for area in self._areas:
            area.hazards.barrier()

    def _places(
        self, instruction: Instruction, addresses: np.ndarray, size: int, active: np.ndarray
    ) -> list[tuple[np.ndarray, Hazards, np.ndarray, np.ndarray]]:
        """For each tensor with active lanes: its content, hazards, bytes [lanes, size] and lanes [n] bool."""
        if (addresses[active] % np.uint64(size)).any():
            self._findings.add(instruction, "misaligned")
        areas = self._areas_of(addresses, active)
        found = []
        for index in np.unique(areas[active]):
            lanes = active & (areas == index)
            if index < 0:
                self._findings.add(instruction, "out of global memory", f"address 0x{int(addresses[lanes][0]):x}")
                continue
            area = self._areas[index]
            at = addresses.astype(np.int64) - area.start
            inside = (at >= 0) & (at + size <= len(area.content))
            inside[inside] = area.is_inside[at[inside][:, None] + np.arange(size)].all(axis=1)
            if (lanes & ~inside).any():
                wrong = at[lanes & ~inside]
                self._findings.add(
                    instruction,
                    "out of a tensor",
                    f"{area.names}: {wrong.min()} … {wrong.max() + size} of {len(area.content)}",
                )
            lanes &= inside
            if lanes.any():
                found.append((area.content, area.hazards, at[lanes][:, None] + np.arange(size), lanes))
        return found

    def _areas_of(self, addresses: np.ndarray, active: np.ndarray) -> np.ndarray:
        """[n] int64, which area each address is of; −1: of none."""
        # half of a gap belongs to the tensor above it
        areas = np.searchsorted(self._starts - np.uint64(_GAP // 2), addresses, "right") - 1
        is_beyond = areas == len(self._starts) - 1
        areas[is_beyond] = -1
        others = active & is_beyond
        while others.any():
            address = int(addresses[others][0])
            index = self._area_in_process(address)
            lanes = addresses == np.uint64(address)
            if index >= 0:
                start, size = self._areas[index].start, len(self._areas[index].content)
                lanes = (addresses >= np.uint64(start)) & (addresses < np.uint64(start + size))
            areas[others & lanes] = index
            others &= ~lanes
        return areas

    def _area_in_process(self, address: int) -> int:
        """The area of a tensor that is alive and has this address; −1 without one."""
        for index, area in enumerate(self._areas):
            if area.start <= address < area.start + len(area.content):
                return index
        for start, (size, tensor) in self._alive.items():
            if start <= address < start + size:
                self._add(f"a tensor at 0x{start:x}", start, tensor)
                return len(self._areas) - 1
        return -1

    @cached_property
    def _alive(self) -> dict[int, tuple[int, Tensor]]:
        """By address, sizes in bytes of all storages of this process, and one tensor of each."""
        tensors = (each for each in gc.get_objects() if type(each) in {Tensor, Parameter})
        dense = (each for each in tensors if each.device.type == "cpu" and each.layout == torch.strided)
        storages = ((tensor.untyped_storage(), tensor) for tensor in dense)
        return {storage.data_ptr(): (storage.nbytes(), tensor) for storage, tensor in storages}


def _is_inside(tensors: list[Tensor], size: int) -> np.ndarray:
    """[size] bool, the bytes of the tensors' storage that are elements of any."""
    is_inside = np.zeros(size, bool)
    for tensor in tensors:
        width = tensor.element_size()
        elements = torch.zeros(size // width, dtype=torch.bool)
        elements.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(value=True)
        is_inside[: size // width * width] |= np.repeat(elements.numpy(), width)
    return is_inside
