"""The last touch on files before they are renamed to where others will look for them."""

import os
from pathlib import Path


def finish(path: Path) -> None:
    """Put a written file or folder on the disk for good, with the mode that any new file gets.

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


def finish_folder(folder: Path) -> None:
    """`finish` all that is in a folder, and then itself."""
    for path in (*folder.rglob("*"), folder):
        finish(path)
