"""Token files of upstream GPT-BERT: `torch.save` of a list of tensors."""

from array import array
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gptbert.errors import InputError
from gptbert.io.torch_file import SavedTensor, Storage, TorchFile
from gptbert.text.special_tokens import BOS_ID

# dtype of a .bin's tensors → dtype of the ids read from it
_TOKEN_TYPES: dict[torch.dtype, Any] = {
    torch.uint8: np.uint8, torch.int8: np.uint8, torch.int16: np.uint16, torch.uint16: np.uint16,
    torch.int32: np.uint32, torch.uint32: np.uint32, torch.int64: np.uint32,
}  # fmt: skip
_EXPECTED = "expected a list of 1-D integer tensors, as upstream saves it"


def read_token_file(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Read an upstream `.bin`: `torch.save` of a list of 1-D integer tensors, one per document.

    In int16 files, ids from 32768 up are negative; they are read as unsigned. A leading `<s>` is dropped.

    Returns:
        Token ids [num_tokens] and document offsets [num_documents + 1] int64.

    Raises:
        InputError: the file is damaged or holds anything but integer tensors (no code is run).
    """
    try:
        with TorchFile(path) as file:
            documents = _Documents()
            tokens, offsets = documents.read(file, file.value(build=documents.add))
    except InputError as error:
        if _is_text(Path(path)):
            raise InputError(
                f"token file {path}: is text; tokenize_scripts/tokenize_corpus.py makes tokens of it"
            ) from None
        raise InputError(f"token file {path}: {error}; tokenize the corpus again") from error
    starts = offsets[:-1][np.diff(offsets) > 0]
    led = starts[tokens[starts] == BOS_ID]  # positions of documents' leading `<s>`
    return np.delete(tokens, led) if len(led) else tokens, offsets - np.searchsorted(led, offsets)


def _is_text(path: Path) -> bool:
    with suppress(OSError, UnicodeDecodeError):
        with path.open("rb") as file:
            beginning = file.read(4096)
        return b"\0" not in beginning and bool(beginning[:-4].decode("utf-8"))  # the last character may be cut
    return False


class _Documents:
    """Locations of a file's tensors, as integers: for short documents objects would take several times the file."""

    def __init__(self) -> None:
        self._storages: list[Storage] = []
        self._places = array("q")  # storage, offset, length and stride of each tensor
        self._dtype: Any = None  # of all tensors, once there are some

    def add(self, saved: SavedTensor) -> int:
        """Record a tensor's location; returns its number."""
        if len(saved.shape) != 1 or saved.dtype not in _TOKEN_TYPES:
            raise InputError(_EXPECTED)
        if self._dtype not in {None, saved.dtype}:
            raise InputError("expected documents of one integer type, as upstream saves them")
        self._dtype = saved.dtype
        if not self._storages or saved.storage != self._storages[-1]:
            self._storages.append(saved.storage)
        self._places.extend((len(self._storages) - 1, saved.offset, saved.shape[0], max(1, saved.stride[0])))
        return len(self._places) // 4 - 1

    def read(self, file: TorchFile, numbers: Any) -> tuple[np.ndarray, np.ndarray]:
        """Concatenate the tensors with these numbers; also returns their offsets. Holds one storage at a time."""
        count = len(self._places) // 4
        if type(numbers) is not list or not all(type(number) is int and 0 <= number < count for number in numbers):
            raise InputError(_EXPECTED)
        if not numbers:
            return np.empty(0, np.uint16), np.zeros(1, np.int64)
        places = np.frombuffer(self._places, np.int64).reshape(-1, 4)[numbers]
        if places[:, 2].sum(dtype=float) * self._dtype.itemsize > file.size:
            raise InputError("its documents overlap")
        offsets = np.concatenate([[0], np.cumsum(places[:, 2])])
        tokens = np.empty(offsets[-1], _TOKEN_TYPES[self._dtype])
        names = [self._storages[index].key for index in places[:, 0]]
        storage: Any = None
        ids = None
        for index in sorted(range(len(names)), key=names.__getitem__):  # grouped by storage
            place, first, length, stride = places[index].tolist()
            if ids is None or self._storages[place].key != storage.key:
                storage = self._storages[place]
                ids = _unwrap(file.tensor(storage).view(self._dtype).numpy())
            elif self._storages[place] != storage:
                raise InputError("a storage is described in two ways")
            tokens[offsets[index] : offsets[index + 1]] = ids[first::stride][:length]
        return tokens, offsets


def _unwrap(ids: np.ndarray) -> np.ndarray:
    """Reinterpret or check ids as unsigned."""
    if ids.dtype == np.int16:
        return ids.view(np.uint16)
    if ids.size and (ids.min() < 0 or ids.max() >= 2**32):
        raise InputError(f"holds token ids from {ids.min()} to {ids.max()}, expected 32 bits unsigned")
    return ids
