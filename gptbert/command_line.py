"""Commands: a frozen dataclass is the command line, and bad input is one line on the screen."""

import contextlib
import io
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import tyro

from gptbert.errors import InputError, LostProcessError, SharedError, StoppedError

Settings = TypeVar("Settings")

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: start the same command again, and it goes on


def run_command(
    settings: type[Settings], function: Callable[[Settings], None], arguments: Sequence[str] | None = None
) -> None:
    """Parse the command line into `settings`, call `function` with it, and end the process.

    The exit status is 0, 2 for a command line that cannot be parsed, 1 for other input that cannot be used and for a
    run that lost one of its processes, `STOPPED` for a run that a signal stopped at a checkpoint, and 130 after Ctrl-C
    or SIGTERM at other times, both of which clean up. What all processes of a run have to say, the first of each host
    says; what one alone knows, that one does, with its rank.
    """
    if "LOCAL_RANK" not in os.environ:  # under torchrun, SIGTERM ends at once a process that may be waiting for others
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        parsed = parse(settings, arguments)
    except InputError as error:
        _fail(str(error), 1)
    try:
        function(parsed)
    except SharedError as error:
        _fail(str(error), 1)
    except (InputError, LostProcessError) as error:
        who = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
        _fail(f"{who}{error}", 1, by_all=True)
    except StoppedError as error:
        _end(str(error) if _speaks() else "", STOPPED)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    if "RANK" in os.environ:
        _end("", 0)


def parse(settings: type[Settings], arguments: Sequence[str] | None = None) -> Settings:
    """The command line as `settings`; prints one line and exits with 2 where tyro finds a mistake."""
    output, errors = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            return tyro.cli(settings, args=arguments, use_underscores=True)
    except SystemExit as end:
        if end.code in {0, None}:  # --help
            if _speaks():
                print(output.getvalue(), end="")
            raise
        _fail(_one_line(errors.getvalue()), 2)


def _one_line(box: str) -> str:
    """What the box says that tyro draws around mistakes: its parts, without borders, title and pointers to the help."""
    parts: list[list[str]] = [[]]
    for line in (line.strip("│ ") for line in box.splitlines()):
        if re.fullmatch("[─-]{10,}", line):
            parts.append([])
        elif line and line[0] not in "╭╰":
            parts[-1].append(line)
    if "╭" not in box:  # where the screen knows no box characters, the title is a part of its own
        parts = parts[1:]
    messages = []
    for part in parts:
        if part[0].startswith("Missing from"):
            messages.append("missing " + ", ".join(line.split()[0] for line in part if line.startswith("--")))
        elif not part[0].startswith(("For full helptext", "Argument helptext")):
            messages.append(" ".join(part))
    return "; ".join(messages) + " (see --help)"


def _fail(message: str, status: int, by_all: bool = False) -> None:
    _end(f"error: {message}" if by_all or _speaks() else "", status)


def _end(message: str, status: int) -> None:
    """End the process; one among several without Python's own last steps.

    There, a thread of gloo that wants to free what the last collective used finds Python gone, and aborts the process.
    """
    if message:
        print(message, file=sys.stderr)
    if "RANK" in os.environ:
        if status and not message:
            time.sleep(2)  # torchrun ends all when the first has ended, also the one that has yet to say why
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _speaks() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"
