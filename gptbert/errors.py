"""The errors that end a command with one line, and no traceback: none of them means "our bug"."""

from collections.abc import Iterator
from contextlib import contextmanager


class OneLineError(Exception):
    """An error whose message is one line; line breaks and control characters in it are shown as escapes."""

    def __init__(self, message: str) -> None:
        shown = (part if part.isprintable() else part.encode("unicode_escape").decode() for part in message)
        super().__init__("".join(shown))


class InputError(OneLineError):
    """Something the user gave cannot be used.

    The message names the flag, file or line at fault and what would work; commands print it and exit with a non-zero
    status.
    """


class SharedError(InputError):
    """An `InputError` that every process of the run raises with the same message, so that one a host says it."""


class LostProcessError(OneLineError):
    """Another process of the run has ended, hangs, or is not reached."""


class StoppedError(OneLineError):
    """The run ended early, at a checkpoint, because a signal asked it to."""


@contextmanager
def prefix_errors(flag: str) -> Iterator[None]:
    """A block whose InputErrors name the flag that the user gave."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{flag}: {error}") from None


def first_line(error: BaseException) -> str:
    """What a library says of its error, cut to the one line that a message has room for."""
    return str(error).strip().partition("\n")[0]
