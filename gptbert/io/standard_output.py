"""Standard output: what cannot be written there, and characters that its encoding lacks."""

import contextlib
from collections.abc import Iterator
from typing import Any

from gptbert.errors import OneLineError
from gptbert.io.screen import log


class StandardOutputError(OneLineError):
    """Standard output cannot be written; the cause is the system's error."""


class StandardOutput:
    """Standard output whose failures are told from those of files: each becomes a `StandardOutputError`.

    Characters that its encoding lacks are written as escapes, as on standard error.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._has_said = False

    def write(self, text: str) -> int:
        """See `io.TextIOBase`."""
        with _told_apart():
            try:
                return self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding
                self._say(encoding)
                return self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))

    def flush(self) -> None:
        """See `io.IOBase`."""
        with _told_apart():
            self._stream.flush()

    def _say(self, encoding: str) -> None:
        if not (self._has_said or encoding.lower().startswith("utf")):  # UTF-8 lacks only bytes of files' names
            log(f"standard output is in {encoding}: other characters become escapes; PYTHONIOENCODING=utf-8 keeps them")
        self._has_said = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _told_apart() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StandardOutputError(f"standard output cannot be written: {error.strerror or error}") from error
