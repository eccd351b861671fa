"""Arrays in many files, of which only some are mapped."""

from collections.abc import Callable, Sequence

import numpy as np


class MappedArrays(Sequence[np.ndarray]):
    """The same array of every file, mapped when it is asked for. Who opens files decides how many stay mapped.

    A mapping costs more than its address: the kernel keeps 4 KB for each 2 MB of a file that was ever read, so that
    2 TB of tokens that stayed mapped would end at 4 GB of page tables in every process; and it allows 65,530 mappings.

    Args:
        open_array: gives the array of the file of this number, from a cache or newly mapped.
        lengths: of all arrays.

    Attributes:
        lengths: [files] int64.
    """

    def __init__(self, open_array: Callable[[int], np.ndarray], lengths: Sequence[int]) -> None:
        self._open_array = open_array
        self.lengths = np.array(lengths, np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._open_array(index)


def lengths_of(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """[arrays] int64; opens no file."""
    return arrays.lengths if isinstance(arrays, MappedArrays) else np.array([len(array) for array in arrays], np.int64)
