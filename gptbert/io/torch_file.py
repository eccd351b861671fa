"""Reads `torch.save` files without running code and in memory proportional to the file.

Such a file is a zip archive: `NAME/data.pkl` is a pickle, `NAME/data/KEY` the bytes of a storage. `torch.load` with
`weights_only=True` runs no code either, but a file of a hundred bytes can exhaust memory (`bytearray(10**12)`) or never
finish (a dictionary key of pairs nested fifty deep). So the pickle is interpreted here one opcode at a time, and only
opcodes needed for containers of numbers, strings and tensors are accepted.
"""

import io
import math
import pickletools
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from gptbert.errors import InputError, first_line

_FREE_BYTES = 1 << 24  # of objects, regardless of the file's size
_DEEPEST = 1000  # of marks, one per container being filled
_MOST_WAITING = 100_000  # values not yet in a container; picklers append a thousand at a time
_ENTRY_BYTES = 600  # Python's memory per archive entry, which takes at least 46 bytes in the file
_BROKEN_ARCHIVE = (
    zipfile.BadZipFile, OSError, ValueError, KeyError, IndexError, RuntimeError, EOFError, OverflowError, struct.error,
)  # fmt: skip

_STORAGES = {
    "ByteStorage": torch.uint8, "CharStorage": torch.int8, "ShortStorage": torch.int16, "IntStorage": torch.int32,
    "LongStorage": torch.int64, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "BoolStorage": torch.bool,
}  # fmt: skip
_DTYPES = (
    *_STORAGES.values(), torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip


class Storage(NamedTuple):
    """The bytes of one or several tensors.

    Attributes:
        key: its name in the archive.
        dtype: of the elements; uint8 if the tensors record their own.
        numel: number of elements.
    """

    key: str
    dtype: torch.dtype
    numel: int


class SavedTensor(NamedTuple):
    """A tensor in the file: a view within the bounds of a storage that repeats no element."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


class TorchFile:
    """An open `torch.save` file; the context manager closes it.

    Every method raises InputError, with the reason but not the file's name, if the file is damaged or holds anything
    but tensors, numbers, strings, and lists, tuples and dictionaries of them.

    Attributes:
        size: bytes of the file.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        if not path.is_file():
            raise InputError("no such file")
        self.size = path.stat().st_size
        self._stream = path.open("rb")
        try:
            self._archive = self._open_archive()
        except InputError:
            self._stream.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._archive.close()
        self._stream.close()

    def value(self, build: Callable[[SavedTensor], Any]) -> Any:
        """The saved object.

        Args:
            build: makes the object that represents a tensor.
        """
        return _Pickle(self._read(f"{self._name}/data.pkl"), self.size, build).value()

    def tensor(self, storage: Storage) -> Tensor:
        """The elements of a storage, [numel] of its dtype, as a copy."""
        content = self._read(f"{self._name}/data/{storage.key}")
        if len(content) != storage.numel * storage.dtype.itemsize:
            raise InputError(f"storage {storage.key[:20]} has {len(content)} bytes, expected {storage.numel} elements")
        if not content:
            return torch.empty(0, dtype=storage.dtype)
        return torch.frombuffer(bytearray(content), dtype=storage.dtype)

    def _open_archive(self) -> zipfile.ZipFile:
        """Open the archive, unless its entries claim more than the file holds."""
        try:
            # the directory's size, before it is parsed into objects, which no public function tells
            ending = zipfile._EndRecData(self._stream)  # type: ignore[attr-defined]  # noqa: SLF001
            if ending is None:
                self._stream.seek(0)
                if self._stream.read(2) == b"PK":
                    raise InputError("cut short: its archive has no end")
                raise InputError("refused, since it is not an archive, as torch.save writes since version 1.6")
            if ending[5] > _FREE_BYTES and ending[5] // 46 * _ENTRY_BYTES > 4 * self.size:
                raise InputError("its archive lists more entries than its size allows")
            archive = zipfile.ZipFile(self._stream)
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise InputError("its archive is compressed, which torch.save never does")
            if sum(entry.file_size for entry in entries) > self.size:
                raise InputError("its archive claims to hold more than there is")
            names = [entry.filename for entry in entries if entry.filename.endswith("/data.pkl")]
            if len(names) != 1:
                raise InputError("not an archive that torch.save wrote")
            self._name = names[0].removesuffix("/data.pkl")
            order = f"{self._name}/byteorder"
            if order in archive.namelist() and archive.read(order) != b"little":
                raise InputError("saved on a machine with a different byte order")
        except _BROKEN_ARCHIVE as error:
            raise InputError(f"its archive cannot be read: {first_line(error)[:100]}") from error
        return archive

    def _read(self, name: str) -> bytes:
        try:
            return self._archive.read(name)
        except _BROKEN_ARCHIVE as error:
            raise InputError(f"its archive cannot be read: {first_line(error)[:100]}") from error


def load_torch_file(path: str | Path) -> Any:
    """Load a `torch.save` file onto the CPU; tensors that share a storage in the file share memory.

    Raises:
        InputError: the reason, without the file's name; see `TorchFile`.
    """
    storages: dict[str, tuple[Storage, Tensor]] = {}

    with TorchFile(path) as file:

        def build(saved: SavedTensor) -> Tensor:
            storage, _ = storages.get(saved.storage.key, (None, None))
            if storage is None:
                storages[saved.storage.key] = saved.storage, file.tensor(saved.storage)
            elif storage != saved.storage:
                raise InputError("a storage is described in two ways")
            whole = storages[saved.storage.key][1].view(saved.dtype)
            return whole.as_strided(saved.shape, saved.stride, saved.offset)

        return file.value(build)


class _Mark:
    """A global that a pickle may name; it is recognized, never called."""


_TENSOR, _TENSOR_WITH_DTYPE, _PARAMETER, _DICTIONARY, _ANY_STORAGE, _FORGOTTEN = (_Mark() for _ in range(6))
_GLOBALS = {
    "torch._utils _rebuild_tensor_v2": _TENSOR,
    "torch._utils _rebuild_tensor_v3": _TENSOR_WITH_DTYPE,
    "torch._utils _rebuild_parameter": _PARAMETER,  # a tensor, whether it needs a gradient, and hooks
    "torch._utils _rebuild_parameter_with_state": _PARAMETER,  # and attributes
    "collections OrderedDict": _DICTIONARY,  # a module's state_dict; also an empty dictionary of hooks per tensor
    "torch.storage UntypedStorage": _ANY_STORAGE,
    **{f"torch {name}": dtype for name, dtype in _STORAGES.items()},
    **{f"torch {str(dtype).removeprefix('torch.')}": dtype for dtype in _DTYPES},
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_PLAIN = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Pickle:
    """Interpreter of a protocol-2 pickle, as torch.save writes it."""

    def __init__(self, content: bytes, file_size: int, build: Callable[[SavedTensor], Any]) -> None:
        self._content = content
        self._build = build
        self._left = _FREE_BYTES + 2 * file_size  # bytes that objects may still take
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: list[Any] = []

    def value(self) -> Any:
        """Read to the end; InputError if it is not a pickle of tensors."""
        steps: dict[str, Callable[[str, Any], None]] = {
            "MARK": self._mark, "GLOBAL": self._global, "BINUNICODE": self._string, "BINPUT": self._put,
            "LONG_BINPUT": self._put, "BINGET": self._get, "LONG_BINGET": self._get, "TUPLE": self._tuple,
            "EMPTY_LIST": self._list, "EMPTY_DICT": self._dict, "APPEND": self._append, "APPENDS": self._append,
            "SETITEM": self._set_items, "SETITEMS": self._set_items, "BINPERSID": self._storage,
            "REDUCE": self._reduce, "BUILD": self._drop_attributes,
        }  # fmt: skip
        try:
            for opcode, argument, _ in pickletools.genops(io.BytesIO(self._content)):
                name = opcode.name
                if name in steps:
                    steps[name](name, argument)
                elif name in _PLAIN:
                    self._stack.append(argument)
                elif name in _CONSTANTS:
                    self._stack.append(_CONSTANTS[name])
                elif name in _TUPLES:
                    self._push(tuple(self._take(len(self._stack) - _TUPLES[name])))
                elif name == "STOP":
                    return self._stack.pop()
                elif name != "PROTO":
                    raise InputError(f"refused, since its pickle says {name}, which tensors do not take (maybe code)")
                if len(self._stack) > _MOST_WAITING:
                    raise InputError("its pickle holds more values than containers for them")
        except (ValueError, IndexError, TypeError, KeyError, AttributeError, OverflowError, RuntimeError) as error:
            raise InputError(f"its pickle is damaged: {first_line(error)[:100]}") from error
        raise InputError("its pickle is cut short")

    def _push(self, value: Any) -> None:
        self._charge(sys.getsizeof(value))
        self._stack.append(value)

    def _charge(self, size: int) -> None:
        self._left -= size
        if self._left < 0:
            raise InputError("its pickle makes more objects than a file of its size should")

    def _take(self, start: int) -> list[Any]:
        """Pop everything from `start` on off the stack."""
        if start < (self._marks[-1] if self._marks else 0):
            raise IndexError("a value is missing")
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def _mark(self, *_: object) -> None:
        self._marks.append(len(self._stack))
        if len(self._marks) > _DEEPEST:
            raise InputError("its pickle is nested too deeply")

    def _global(self, _: str, name: str) -> None:
        if name not in _GLOBALS:
            raise InputError(
                f"refused, since it names {name[:60]!r} and not only tensors (maybe code); "
                "torch.save(model.state_dict(), FILE) writes tensors alone"
            )
        self._stack.append(_GLOBALS[name])

    def _string(self, _: str, value: str) -> None:
        self._push(value)

    def _put(self, _: str, index: int) -> None:
        if index != len(self._memo):
            raise ValueError("its memo is out of order")
        self._memo.append(self._stack[-1])

    def _get(self, _: str, index: int) -> None:
        if self._memo[index] is _FORGOTTEN:
            raise ValueError("it refers twice to what describes a tensor")
        self._stack.append(self._memo[index])

    def _tuple(self, *_: object) -> None:
        start = self._marks[-1]
        values = tuple(self._take(start))
        self._marks.pop()
        self._push(values)

    def _list(self, *_: object) -> None:
        self._push([])

    def _dict(self, *_: object) -> None:
        self._push({})

    def _append(self, name: str, _: object) -> None:
        values = self._take_items(1 if name == "APPEND" else None)
        target = self._stack[-1]
        if type(target) is not list:
            raise TypeError("appends to something that is not a list")
        self._charge(8 * len(values))
        target.extend(values)

    def _set_items(self, name: str, _: object) -> None:
        items = self._take_items(2 if name == "SETITEM" else None)
        target = self._stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise TypeError("sets an item of something that is not a dictionary")
        self._charge(64 * len(items))
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in {str, int, float, bool}:
                raise TypeError("a dictionary key is not a string or number")  # hashing a nested tuple may never finish
            target[key] = value

    def _take_items(self, count: int | None) -> list[Any]:
        if count is not None:
            return self._take(len(self._stack) - count)
        values = self._take(self._marks[-1])
        self._marks.pop()
        return values

    def _storage(self, *_: object) -> None:
        described = self._stack.pop()
        kind, dtype, key, _location, numel = described
        dtype = torch.uint8 if dtype is _ANY_STORAGE else dtype
        known = kind == "storage" and isinstance(dtype, torch.dtype) and type(key) is str and type(numel) is int
        if not known or numel < 0:
            raise TypeError("a storage is not described as torch.save does")
        self._forget(described)
        self._stack.append(Storage(key, dtype, numel))

    def _reduce(self, *_: object) -> None:
        function, arguments = self._take(len(self._stack) - 2)
        if function is _DICTIONARY and arguments == ():
            self._push({})
            return
        if function is _PARAMETER:
            tensor, _gradient, hooks, *_attributes = arguments
            if isinstance(tensor, str | int | float | tuple | list | dict | torch.dtype | _Mark | None):
                raise InputError("refused, since it has a parameter that is no tensor")
            self._forget(arguments, hooks)
            self._push(tensor)
            return
        if function is _TENSOR:
            storage, offset, shape, stride, _gradient, hooks, *_rest = arguments
            dtype = storage.dtype
        elif function is _TENSOR_WITH_DTYPE:
            storage, offset, shape, stride, _gradient, hooks, dtype, *_rest = arguments
        else:
            raise InputError("refused, since it calls a function that makes no tensor (maybe code)")
        saved = SavedTensor(storage, dtype, offset, shape, stride)
        if not _lies_inside(saved):
            raise InputError("a tensor reaches outside its storage or repeats elements of it")
        self._forget(arguments, shape, stride, hooks)
        self._push(self._build(saved))

    def _drop_attributes(self, *_: object) -> None:
        """Drop a state_dict's attributes: the dictionary of its modules' versions."""
        attributes = self._take(len(self._stack) - 1)[0]
        if type(attributes) is not dict or type(self._stack[-1]) is not dict:
            raise TypeError("sets attributes of something that is not a dictionary")

    def _forget(self, *parts: object) -> None:
        """Drop objects that only describe a tensor: most of a file's pickle if it has many small tensors."""
        for index in range(max(0, len(self._memo) - 4), len(self._memo)):
            if any(self._memo[index] is one for one in parts):
                self._left += sys.getsizeof(self._memo[index])
                self._memo[index] = _FORGOTTEN


def _lies_inside(saved: SavedTensor) -> bool:
    storage, dtype, offset, shape, stride = saved
    if type(storage) is not Storage or not isinstance(dtype, torch.dtype) or type(shape) is not tuple:
        return False
    numbers = [offset, *shape, *stride] if type(stride) is tuple and len(stride) == len(shape) <= 8 else [None]
    if not all(type(number) is int and 0 <= number < 2**62 for number in numbers):
        return False
    numel = storage.numel * storage.dtype.itemsize // dtype.itemsize
    if saved.numel == 0:
        return offset <= numel
    if any(step == 0 and size > 1 for size, step in zip(shape, stride, strict=True)):
        return False
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    return last < numel and saved.numel <= numel - offset
