"""Global memory: the tensors of a launch. Addresses and accesses are as in `memory`."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from kernels.machine_code.findings import Findings
from kernels.machine_code.hazards import Hazards
from kernels.machine_code.listing import Instruction

_GAP = 64 << 20  # bytes between tensors: an address that leaves one does not lie in the next
_FIRST = 0x7F0000000000


class GlobalMemory:
    """The tensors of a launch, each at an address of its own, far from the others; stores change the tensors.

    Attributes:
        pointers: address of each tensor's first element.
    """

    def __init__(self, tensors: Mapping[str, Tensor], num_threads: int, findings: Findings) -> None:
        storages: dict[int, list[tuple[str, Tensor]]] = {}
        for name, tensor in tensors.items():
            storages.setdefault(tensor.untyped_storage().data_ptr(), []).append((name, tensor))
        self.pointers: dict[str, int] = {}
        self._areas: list[tuple[str, int, np.ndarray, np.ndarray, Hazards]] = []
        self._findings = findings
        start = _FIRST
        for members in storages.values():
            content = torch.empty(0, dtype=torch.uint8).set_(members[0][1].untyped_storage()).numpy()
            for name, tensor in members:
                self.pointers[name] = start + int(tensor.storage_offset()) * tensor.element_size()
            names = " or ".join(name for name, _ in members)
            inside = np.zeros(len(content), bool)
            for _, tensor in members:
                inside[: len(content) // tensor.element_size() * tensor.element_size()] |= _bytes_of(
                    tensor, len(content)
                )
            self._areas.append((names, start, content, inside, Hazards(len(content), num_threads)))
            start += (len(content) + _GAP) // 512 * 512
        self._starts = np.array([start for _, start, *_ in self._areas] + [start], np.uint64)

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
        for *_, hazards in self._areas:
            hazards.barrier()

    def _places(
        self, instruction: Instruction, addresses: np.ndarray, size: int, active: np.ndarray
    ) -> list[tuple[np.ndarray, Hazards, np.ndarray, np.ndarray]]:
        """For each tensor with active lanes: its content, hazards, bytes [lanes, size] and lanes [n] bool."""
        if (addresses[active] % np.uint64(size)).any():
            self._findings.add(instruction, "misaligned")
        # half of a gap belongs to the tensor above it
        areas = np.searchsorted(self._starts - np.uint64(_GAP // 2), addresses, "right") - 1
        found = []
        for index in np.unique(areas[active]):
            lanes = active & (areas == index)
            if not 0 <= index < len(self._areas):
                self._findings.add(instruction, "out of global memory", f"address 0x{int(addresses[lanes][0]):x}")
                continue
            names, start, content, is_inside, hazards = self._areas[index]
            at = addresses.astype(np.int64) - start
            inside = (at >= 0) & (at + size <= len(content))
            inside[inside] = is_inside[at[inside][:, None] + np.arange(size)].all(axis=1)
            if (lanes & ~inside).any():
                wrong = at[lanes & ~inside]
                self._findings.add(
                    instruction, "out of a tensor", f"{names}: {wrong.min()} … {wrong.max() + size} of {len(content)}"
                )
            lanes &= inside
            if lanes.any():
                found.append((content, hazards, at[lanes][:, None] + np.arange(size), lanes))
        return found


def _bytes_of(tensor: Tensor, size: int) -> np.ndarray:
    """[size] bool, the bytes of a tensor's storage that are elements of it."""
    width = tensor.element_size()
    elements = torch.zeros(size // width, dtype=torch.bool)
    elements.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(value=True)
    return np.repeat(elements.numpy(), width)
