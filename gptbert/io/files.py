"""Atomic writes of files and folders: fsync, rename, delete."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from gptbert.errors import InputError, first_line


def fsync_file(path: Path) -> None:
    """Flush a written file or folder to the disk, and give the file the mode of any new file.

    The mode matters for safetensors files, which the library makes readable for their owner alone.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        if path.is_file():
            umask = os.umask(0)
            os.umask(umask)
            os.fchmod(handle, 0o666 & ~umask)
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_folder(folder: Path) -> None:
    """`fsync_file` for everything in a folder, and then for the folder itself."""
    for path in (*folder.rglob("*"), folder):
        fsync_file(path)


def publish(temporary: Path, final: Path) -> None:
    """Fsync a complete folder and rename it to its final name, in place of what had that name."""
    fsync_folder(temporary)
    if final.exists():
        delete(final)
    temporary.rename(final)
    fsync_file(final.parent)


def delete(folder: Path) -> None:
    """Delete a folder so that a kill half-way leaves nothing that looks complete."""
    shutil.rmtree(move_away(folder, f".{folder.name}.deleted"))


def move_away(folder: Path, name: str) -> Path:
    """Rename a folder, in place of what had that name."""
    there = folder.with_name(name)
    if there.exists():
        shutil.rmtree(there)
    return folder.rename(there)


@contextmanager
def new_folder(output: Path, what: str, replace: bool = False) -> Iterator[Path]:
    """A folder to fill, that gets its name and place when the block ends without an error, and is gone after one.

    Args:
        output: must not be there yet, unless it may be replaced.
        what: names it in messages, such as a flag.
        replace: take the place of what is there.

    Raises:
        InputError: it is there already, or cannot be written.
    """
    if output.exists() and not replace:
        raise InputError(f"{what} {output}: is there already")
    output = output.absolute()
    temporary, deleted = (output.with_name(f".{output.name}.{state}") for state in ("incomplete", "deleted"))
    try:
        for leftover in (temporary, deleted) if replace else (temporary,):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        publish(temporary, output)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{what} {output}: cannot be written ({first_line(error)})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
