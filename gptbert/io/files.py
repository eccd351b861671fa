"""Atomic writes of files and folders: fsync, rename, delete."""

import os
import reprlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gptbert.errors import InputError


def check_folder_name(flag: str, name: str, where: str) -> None:
    """Refuse what cannot be the name of a single folder inside of another, which the flag `where` names.

    Raises:
        InputError: it is too long, empty, a path, or has characters that are not printable.
    """
    size = len(os.fsencode(name)) if name.isprintable() else 0
    if size > 200:
        raise InputError(f"{flag} has {size} bytes, expected at most 200")
    if size == 0 or name in {".", ".."} or "/" in name or "\\" in name:
        found = reprlib.repr(name)
        raise InputError(f"{flag} {found} must be the name of one folder inside {where}, of printable characters")


def visible_files(folder: Path, *patterns: str) -> list[Path]:
    """The files of a folder that match a pattern, sorted, without hidden ones and those in hidden folders.

    macOS puts a `._name` beside every file of an archive, and Jupyter a copy into `.ipynb_checkpoints`.
    """
    found = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    return sorted(file for file in found if not any(part[0] == "." for part in file.relative_to(folder).parts))


def fsync_file(path: Path) -> None:
    """Flush a file or folder to disk, and give a file the default mode of new files.

    The mode matters for safetensors files, which the library makes readable only by their owner.
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
    """`fsync_file` on everything in a folder, then on the folder itself."""
    for path in (*folder.rglob("*"), folder):
        fsync_file(path)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what takes the place of the file `path` after the block, fsynced; an error leaves `path` alone."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        yield temporary
        fsync_file(temporary)
        temporary.replace(path)
        fsync_file(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def publish(temporary: Path, final: Path) -> None:
    """Fsync a complete folder and rename it to its final name, replacing any existing one."""
    fsync_folder(temporary)
    if os.path.lexists(final):
        delete(final)
    temporary.rename(final)
    fsync_file(final.parent)


def delete(folder: Path) -> None:
    """Delete a folder, as `remove` does; a kill halfway leaves nothing that looks complete."""
    remove(move_away(folder, f".{folder.name}.deleted"))


def remove(folder: Path) -> None:
    """Delete a folder, or a link to one, but not what the link leads to."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder)


def move_away(folder: Path, name: str) -> Path:
    """Rename a folder, replacing any existing one."""
    there = folder.with_name(name)
    if os.path.lexists(there):
        remove(there)
    return folder.rename(there)
