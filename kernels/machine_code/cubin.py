"""The file of a compiled kernel: its instructions as text, and numbers that it keeps beside them."""

import importlib
import struct
import subprocess
import tempfile
from pathlib import Path

_SECTION = struct.Struct("<II QQQQ")  # of an ELF file: name, type, flags, address, offset, size
_CONSTANTS = b".nv.constant2."


def disassemble(cubin: bytes) -> str:
    """The listing of a compiled kernel, by the disassembler of Triton's wheel.

    Raises:
        OSError: there is none.
        subprocess.CalledProcessError: it cannot read the file.
    """
    try:
        path = importlib.import_module("triton.knobs").nvidia.cuobjdump.path
    except RuntimeError as error:
        raise OSError(str(error)) from error
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        return subprocess.run([path, "-sass", file], capture_output=True, text=True, check=True).stdout


def constants(cubin: bytes) -> bytes:
    """Bank 2 of the constant memory: on sm_80, numbers too long for an instruction; empty if there are none."""
    (first,) = struct.unpack_from("<Q", cubin, 0x28)  # of the section headers
    size, count, names = struct.unpack_from("<3H", cubin, 0x3A)
    sections = [_SECTION.unpack_from(cubin, first + index * size) for index in range(count)]
    of_names = sections[names][4]
    for name, _, _, _, offset, length in sections:
        if cubin.startswith(_CONSTANTS, of_names + name):
            return cubin[offset : offset + length]
    return b""
