"""`manifest.json` of a folder: size and SHA-256 of each file, to detect damage before anything is used."""

import errno
import hashlib
from collections.abc import Iterable
from pathlib import Path

from gptbert.errors import InputError, first_line
from gptbert.io.json_file import read_json, write_json
from gptbert.io.names import MANIFEST

Entry = dict[str, int | str]

_MOST_BYTES = 1 << 22  # some ten thousand entries


def entry(path: Path) -> Entry:
    """A file's entry in a manifest."""
    return {"bytes": path.stat().st_size, "sha256": _digest(path)}


def write(folder: Path, known: dict[str, Entry] | None = None) -> None:
    """List every file below the folder, with its current content: {name: {"bytes": …, "sha256": …}}.

    Args:
        folder: all of its files are complete.
        known: entries that other ranks have computed already.

    Raises:
        FileNotFoundError: a known file is not visible from here.
    """
    entries = dict(known or {})
    if hidden := [name for name in entries if not (folder / name).is_file()]:
        reason = f"{hidden[0]} of another host is not to be seen here; --output_dir must be one folder for all hosts"
        raise FileNotFoundError(errno.ENOENT, reason)
    files = (path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    names = sorted(path.relative_to(folder).as_posix() for path in files)
    entries |= {name: entry(folder / name) for name in names if name not in entries}
    write_json(folder / MANIFEST, entries)


def check(folder: Path, names: Iterable[str] | None = None) -> None:
    """Verify that files are as they were written.

    Args:
        folder: one with a manifest.
        names: files to read; None reads all.

    Raises:
        InputError: a file is missing, truncated or changed; names the file, not the folder.
    """
    entries = read(folder)
    for name in entries if names is None else names:
        if name not in entries:
            raise InputError(f"{name}: not in {MANIFEST}")
        try:
            _check_file(folder, name, entries[name])
        except (OSError, ValueError) as error:  # for example, a name that is too long or contains a NUL
            raise InputError(f"{name[:100]}: cannot be read ({first_line(error)[:100]})") from error


def read(folder: Path) -> dict[str, Entry]:
    """The entries of a folder's manifest.

    Raises:
        InputError: it is missing or damaged.
    """
    try:
        entries = read_json(folder / MANIFEST, _MOST_BYTES)
    except FileNotFoundError:
        raise InputError(f"{MANIFEST}: no such file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{MANIFEST}: cannot be read ({error})") from error
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise InputError(f"{MANIFEST}: expected an object of objects")
    return entries


def digest(folder: Path) -> str:
    """Recognizes the contents that a folder's manifest lists; raises InputError as `read` does."""
    return hashlib.sha256(repr(sorted(read(folder).items())).encode()).hexdigest()


def _check_file(folder: Path, name: str, expected: Entry) -> None:
    path, size = folder / name, expected.get("bytes")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise InputError(f"{name[:100]}: is not in the folder")
    if not path.is_file():  # reading a pipe or device may never end
        raise InputError(f"{name}: no such file")
    if path.stat().st_size != size:
        raise InputError(f"{name}: {path.stat().st_size} bytes instead of {str(size)[:20]}")
    if _digest(path) != expected.get("sha256"):
        raise InputError(f"{name}: its content has changed since it was written")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
