"""The one error that means "your input", never "our bug"."""


class InputError(Exception):
    """Something the user gave cannot be used.

    The message is one line that names the flag, file or line at fault and what would work; commands print it without a
    traceback and exit with a non-zero status. Line breaks and control characters, of a file's name or of what it holds,
    are shown as escapes.
    """

    def __init__(self, message: str) -> None:
        shown = (part if part.isprintable() else part.encode("unicode_escape").decode() for part in message)
        super().__init__("".join(shown))


def first_line(error: BaseException) -> str:
    """What a library says of its error, cut to the one line that a message has room for."""
    return str(error).partition("\n")[0]
