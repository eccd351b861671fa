"""A file opened for reading text: recognised, unpacked and decoded to UTF-8 as it streams, in bounded memory."""

import bz2
import codecs
import gzip
import importlib
import io
import lzma
import shlex
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gptbert.errors import InputError, first_line
from gptbert.text.file_kind import HEAD_BYTES, FileKind, binary_kind, packing_of
from gptbert.text.text_kind import mark_of, text_kind

CHUNK = 1 << 20  # bytes read at a time
XZ_MEMORY = 1 << 28  # bytes; the largest preset of xz needs a quarter of it, and a header may ask for gigabytes
_OTHER_MARK = "\ufffe"  # no character: a mark whose bytes are the other way round, of a file that was joined
_UNPACKERS = {
    "xz": "xz -d",
    "lz4": "lz4 -d",
    "compress": "uncompress",
    "lzip": "lzip -d",
    "lzma": "unlzma",
    "snappy": "snzip -d",
    "zstd": "zstd -d",
}


class OpenedFile:
    """A file that is being read; see `opened`.

    Attributes:
        file: its path.
        packing: the compression around it; "" for none.
        head: the first bytes, at most `HEAD_BYTES`, unpacked after `unpack`.
    """

    def __init__(self, file: Path, raw: io.RawIOBase) -> None:
        self.file = file
        self.head = _head_of(raw)
        self.packing = packing_of(self.head)
        self._rest: io.RawIOBase = raw

    def unpack(self) -> None:
        """Look inside of the compression."""
        if self.packing:
            packed: io.BufferedReader = io.BufferedReader(_Joined(self.head, self._rest), CHUNK)
            self._rest = _unpacked(self.file, self.packing, packed)
            self.head = _head_of(self._rest)

    def kind(self, text_field: str = "text") -> FileKind:
        """What the file is."""
        kind = binary_kind(self.head)
        if kind is None:
            kind = text_kind(self.head, self.file.name, len(self.head) < HEAD_BYTES, text_field)
        return kind.packed(self.packing)

    def utf8(self, count: Callable[[int], object]) -> io.BufferedReader:
        """The text, unpacked, without its mark, as UTF-8; `count` is called with the number of further bytes of it."""
        mark, encoding = mark_of(self.head)
        stream = _Joined(self.head[len(mark) :], self._rest)
        if encoding != "utf-8":
            stream = _Joined(b"", _Recoded(stream, encoding))
        stream.count = count
        return io.BufferedReader(stream, CHUNK)


@contextmanager
def opened(file: Path, advance: Callable[[int], object] = lambda _: None) -> Iterator[OpenedFile]:
    """Open a file, or a pipe.

    Args:
        file: any file.
        advance: called with the number of further bytes read from the disk, compressed if they are.

    Raises:
        InputError: the file cannot be opened or, at any time in the block, not be read or unpacked.
    """
    packing = ""
    try:
        with _CountedFile(file, advance) as raw:
            read = OpenedFile(file, raw)
            packing = read.packing
            read.unpack()
            yield read
    except UnicodeError as error:  # of UTF-16 and UTF-32
        encoding = getattr(error, "encoding", "an encoding")
        reason = f"its mark says {encoding}, which the rest is not ({first_line(error)})"
        raise InputError(f"{file}: {reason}; copy the file again, or convert it to UTF-8") from error
    except (EOFError, OSError, zlib.error, lzma.LZMAError, _DamagedError) as error:
        if getattr(error, "errno", None) is not None or not packing:
            reason = getattr(error, "strerror", None) or first_line(error)
            raise InputError(f"{file}: cannot be read ({reason})") from error
        if "memory" in str(error).lower():  # a header may ask for gigabytes
            way_on = f"unpack it ({_UNPACKERS[packing]} {shlex.quote(str(file))})"
            raise InputError(f"{file}: takes more memory to unpack than {packing} usually does; {way_on}") from error
        reason = f"the {packing} data is damaged or cut short ({first_line(error)})"
        raise InputError(f"{file}: {reason}; copy the file again") from error


def kind_of(file: Path, text_field: str = "text") -> FileKind:
    """What a file is; reads its first bytes.

    Raises:
        InputError: it cannot be read or unpacked.
    """
    with opened(file) as read:
        return read.kind(text_field)


class _DamagedError(Exception):
    """Compressed data that cannot be unpacked."""


class _CountedFile(io.FileIO):
    """A file that reports the bytes read from disk, compressed ones if they are, to show progress."""

    def __init__(self, file: Path, advance: Callable[[int], object]) -> None:
        super().__init__(file)
        self._advance = advance

    def read(self, size: int | None = -1) -> bytes:  # of FileIO, it does not call readinto
        data = super().read(size)
        self._advance(len(data))
        return data

    def readinto(self, buffer: Any) -> int:
        count = super().readinto(buffer)
        self._advance(count)
        return count


class _Joined(io.RawIOBase):
    """The head that was read already, then the rest; counts bytes."""

    def __init__(self, head: bytes, rest: io.RawIOBase) -> None:
        self._head = memoryview(head)
        self._rest = rest
        self.count: Callable[[int], object] = lambda _: None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if size := min(len(buffer), len(self._head)):
            buffer[:size] = self._head[:size]
            self._head = self._head[size:]
        else:
            size = self._rest.readinto(buffer) or 0
        self.count(size)
        return size


class _Unpacked(io.RawIOBase):
    """Streams of bzip2 or xz, one after the other, unpacked in pieces of the size that is asked for."""

    def __init__(self, packed: io.BufferedReader, decompressor: Callable[[], Any]) -> None:
        self._packed = packed
        self._make = decompressor
        self._decompressor = decompressor()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            data = b""
            if self._decompressor.eof:
                data = self._decompressor.unused_data or self._packed.read1(CHUNK)
                data = data.lstrip(b"\0")  # between the streams of xz
                if not data and not self._packed.peek(1):
                    return 0
                if not data:
                    continue
                self._decompressor = self._make()
            elif self._decompressor.needs_input and not (data := self._packed.read1(CHUNK)):
                raise EOFError("it ends before its end is marked")
            try:
                piece = self._decompressor.decompress(data, len(buffer))
            except OSError as error:
                raise _DamagedError(first_line(error)) from error
            if piece:
                buffer[: len(piece)] = piece
                return len(piece)


class _Recoded(io.RawIOBase):
    """UTF-8 of a text in UTF-16 or UTF-32."""

    def __init__(self, stream: io.RawIOBase, encoding: str) -> None:
        self._stream = io.BufferedReader(stream, CHUNK)
        self._encoding = encoding
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._waiting = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._waiting:
            data = self._stream.read1(CHUNK)
            text = self._decoder.decode(data, final=not data)
            if _OTHER_MARK in text:
                raise UnicodeDecodeError(self._encoding, b"\xfe\xff", 0, 2, "a mark of the other order of bytes")
            self._waiting = text.encode("utf-8")
            if not data:
                break
        piece = self._waiting[: len(buffer)]
        buffer[: len(piece)] = piece
        self._waiting = self._waiting[len(piece) :]
        return len(piece)


def _head_of(raw: io.RawIOBase) -> bytes:
    """The first bytes of a stream, all of them if it is shorter."""
    head = bytearray()
    while len(head) < HEAD_BYTES and (data := raw.read(HEAD_BYTES - len(head))):
        head += data
    return bytes(head)


def _unpacked(file: Path, packing: str, packed: io.BufferedReader) -> Any:
    """A raw stream of what is packed."""
    if packing == "gzip":
        return gzip.GzipFile(fileobj=packed)
    if packing == "bzip2":
        return _Unpacked(packed, bz2.BZ2Decompressor)
    if packing == "xz":
        return _Unpacked(packed, lambda: lzma.LZMADecompressor(memlimit=XZ_MEMORY))
    if packing == "zstd":
        try:
            pyarrow = importlib.import_module("pyarrow")
            return pyarrow.CompressedInputStream(pyarrow.PythonFile(packed, mode="r"), "zstd")
        except ImportError:
            pass
    library = ", or pip install pyarrow" if packing == "zstd" else ""
    raise InputError(
        f"{file}: is compressed with {packing}; unpack it ({_UNPACKERS[packing]} {shlex.quote(str(file))}){library}"
    )
