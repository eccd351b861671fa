"""Atomic writes of files and folders: fsync, rename, delete."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from gptbert.errors import InputError, first_line
from gptbert.io.owner import owned


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


def publish(temporary: Path, final: Path) -> None:
    """Fsync a complete folder and rename it to its final name, replacing any existing one."""
    fsync_folder(temporary)
    if final.exists():
        delete(final)
    temporary.rename(final)
    fsync_file(final.parent)


def delete(folder: Path) -> None:
    """Delete a folder; a kill halfway leaves nothing that looks complete."""
    shutil.rmtree(move_away(folder, f".{folder.name}.deleted"))


def move_away(folder: Path, name: str) -> Path:
    """Rename a folder, replacing any existing one."""
    there = folder.with_name(name)
    if there.exists():
        shutil.rmtree(there)
    return folder.rename(there)


@contextmanager
def new_folder(output: Path, what: str, replace: bool = False) -> Iterator[Path]:
    """A temporary folder to fill, renamed to `output` when the block succeeds, deleted when it fails.

    One process at a time (`gptbert.io.owner`).

    Args:
        output: must not exist unless `replace`.
        what: its name in messages, such as a flag.
        replace: replace an existing folder.

    Raises:
        InputError: it exists already, is being written by another process, or cannot be written.
    """
    named, output = f"{what} {output}", output.absolute()
    if not output.name:
        raise InputError(f"{named}: is no name for a new folder")
    if output.exists() and not replace:
        raise InputError(f"{named}: is there already")
    temporary, deleted = (output.with_name(f".{output.name}.{state}") for state in ("incomplete", "deleted"))
    try:
        with owned(output.with_name(f".{output.name}.owner"), named):
            if output.exists() and not replace:  # finished by another process a moment ago
                raise InputError(f"{named}: is there already")
            try:
                for leftover in (temporary, deleted) if replace else (temporary,):  # from a killed process
                    shutil.rmtree(leftover, ignore_errors=True)
                temporary.mkdir(parents=True)
                yield temporary
                publish(temporary, output)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{named}: cannot be written ({first_line(error)})") from error
