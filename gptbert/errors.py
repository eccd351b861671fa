"""Errors that end a command with one line and no traceback; none of them indicates a bug of ours."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class OneLineError(Exception):
    """An error whose message is one line; line breaks and control characters in it are shown as escapes."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class InputError(OneLineError):
    """The user's input cannot be used.

    The message names the flag, file or line at fault and what would work; commands print it and exit with a nonzero
    status.

    Attributes:
        status: the exit status.
    """

    status = 1


class OwnedError(InputError):
    """Another process writes to the same folder or file."""

    status = 73  # EX_CANTCREAT of sysexits.h


class SharedError(InputError):
    """An `InputError` that every process of the run raises with the same message and status, printed once per host."""

    def __init__(self, message: str, status: int = InputError.status) -> None:
        super().__init__(message)
        self.status = status


class LostProcessError(OneLineError):
    """Another process of the run has ended, hangs, or cannot be reached."""


class StoppedError(OneLineError):
    """The run ended early, at a checkpoint, because of a signal."""


@contextmanager
def prefix_errors(flag: str) -> Iterator[None]:
    """Context manager: prefix the block's InputErrors with the flag that the user gave."""
    try:
        yield
    except InputError as error:
        prefixed = InputError(f"{flag}: {error}")
        prefixed.status = error.status
        raise prefixed from None


def listed(names: Sequence[str], most: int) -> str:
    """Names for a message: the first `most` of them, and the number of the others."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


def one_line(text: str) -> str:
    """A text with escapes in place of line breaks and control characters, which names of files may have."""
    return "".join(part if part.isprintable() else part.encode("unicode_escape").decode() for part in text)


def first_line(error: BaseException) -> str:
    """The first line of a library's error message."""
    return str(error).strip().partition("\n")[0]
