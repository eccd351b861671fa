"""Environment variables: read as numbers, words and folders, and refused in one line that names them.

An empty variable is as good as none, as shells leave them (`NAME= command`).
"""

import math
import os
import pwd
import socket
import tempfile
from collections.abc import Collection
from pathlib import Path

from gptbert.errors import InputError


def text(name: str) -> str | None:
    """A variable's value; None if it is empty or absent."""
    return os.environ.get(name, "").strip() or None


def integer(name: str, lowest: int, highest: int, hint: str = "") -> int | None:
    """A variable that is a whole number; None if it is empty or absent.

    Args:
        name: of the variable.
        lowest: smallest value that is taken.
        highest: largest one.
        hint: the way on, for the message.

    Raises:
        InputError: it is none, or outside these bounds.
    """
    value = text(name)
    if value is None:
        return None
    is_number = value.lstrip("-").isdecimal() and value.isascii() and len(value) <= 18
    if not is_number or not lowest <= int(value) <= highest:
        raise InputError(f"{_said(name)}, expected a whole number from {lowest} to {highest}{hint}")
    return int(value)


def seconds(name: str) -> float | None:
    """A variable that is a positive number of seconds; None if it is empty or absent.

    Raises:
        InputError: it is none.
    """
    value = text(name)
    try:
        number = None if value is None else float(value)
    except ValueError:
        number = math.nan
    if number is not None and not 0 < number < math.inf:
        raise InputError(f"{_said(name)}, expected a positive number of seconds; unset it for the default")
    return number


def choice(name: str, names: Collection[str]) -> str | None:
    """A variable that is one of some words; None if it is empty or absent.

    Raises:
        InputError: it is another one.
    """
    value = text(name)
    if value is not None and value not in names:
        raise InputError(f"{_said(name)}, expected {' or '.join(names)}; unset it for the default")
    return value


def names(prefix: str) -> list[str]:
    """The variables whose names begin so, sorted."""
    return sorted(name for name in os.environ if name.startswith(prefix))


def drop_empty(prefix: str) -> None:
    """Unset the empty variables whose names begin so, for a library that would not take them for absent."""
    drop(*(name for name in names(prefix) if not text(name)))


def drop(*names: str) -> None:
    """Unset variables that are meant for other programs."""
    for name in names:
        os.environ.pop(name, None)


def check_folder(name: str) -> None:
    """Refuse a variable that names a folder which is not there and cannot be made, or cannot be written.

    Raises:
        InputError: names the variable, its value and the reason.
    """
    value = os.environ.get(name)
    if value is None:
        return
    if not value:  # libraries would take it for the current folder
        raise InputError(f"{name} is empty; unset it, or name a folder")
    try:
        Path(value).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=value):
            pass
    except OSError as error:
        raise InputError(f"{_said(name)}, a folder that cannot be written ({error.strerror}); unset it") from error


def check_interfaces(name: str) -> None:
    """Refuse a variable that names network interfaces, separated by commas, of which one is not there.

    Raises:
        InputError: names the variable, its value and those that there are.
    """
    there = [interface for _, interface in socket.if_nameindex()]
    if not set((text(name) or "").split(",")) <= {"", *there}:
        raise InputError(f"{_said(name)}, expected a network interface of this host ({', '.join(there)}); or unset it")


def check_program(name: str) -> None:
    """Refuse a variable that names a program which is not there or cannot be run.

    Raises:
        InputError: names the variable and its value.
    """
    if (value := text(name)) and not (Path(value).is_file() and os.access(value, os.X_OK)):
        raise InputError(f"{_said(name)}, which is no program; unset it, or name one")


def settle_temporary_folder() -> str:
    """Make sure that temporary files have a folder: where TMPDIR names none, libraries get the one that Python takes.

    Returns:
        A line about that; empty if TMPDIR is absent or right.

    Raises:
        InputError: no folder for them can be written.
    """
    try:
        folder = tempfile.gettempdir()
    except FileNotFoundError as error:
        raise InputError(f"TMPDIR: {error.strerror or error}; set it to a folder that can be written") from error
    named = text("TMPDIR")
    if named is None or (Path(named).is_dir() and Path(named).samefile(folder)):
        return ""
    line = f"{_said('TMPDIR')}, a folder that cannot be written; temporary files go to {folder}"
    os.environ["TMPDIR"] = folder
    return line


def provide_home(other: Path) -> None:
    """Set HOME where it is absent, for programs that need it: to the user's own folder, or else to `other`."""
    if text("HOME") is None:
        try:
            os.environ["HOME"] = pwd.getpwuid(os.getuid()).pw_dir
        except KeyError:  # a user without an entry, as in containers
            os.environ["HOME"] = str(other.absolute())


def _said(name: str) -> str:
    return f"{name} is {os.environ[name][:100]!r}"
