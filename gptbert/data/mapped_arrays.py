"""Arrays in many files, only some of them memory-mapped."""

from collections.abc import Callable, Sequence

import numpy as np


class MappedArrays(Sequence[np.ndarray]):
    """The same array of every file, memory-mapped on access. `open_array` decides how many stay mapped.

    Mappings are not free: the kernel keeps 4 KB of page tables for each 2 MB of a mapped file that was ever read, which
    is 4 GB per process for 2 TB of tokens; and it allows 65,530 mappings.

    Args:
        open_array: returns the array of the file with this index, from a cache or newly mapped.
        lengths: of all arrays.

    Attributes:
        lengths: [files] int64.
    """

    def __init__(self, open_array: Callable[[int], np.ndarray], lengths: Sequence[int]) -> None:
        self._open_array = open_array
        self.lengths = np.array(lengths, np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:  # type: ignore[override]  # no slices
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._open_array(index)


def lengths_of(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Lengths of arrays, [arrays] int64; opens no file."""
    return arrays.lengths if isinstance(arrays, MappedArrays) else np.array([len(array) for array in arrays], np.int64)
