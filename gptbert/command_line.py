"""Commands: a frozen dataclass defines the command line; bad input is reported in one line."""

import contextlib
import dataclasses
import inspect
import io
import os
import re
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn, TypeVar

import tyro

from gptbert.errors import InputError, LostProcessError, SharedError, StoppedError
from gptbert.io import environment
from gptbert.io.run_file import FLAG, named_file, repeated, switch_with_value, with_home
from gptbert.io.screen import Lasting, log, provide_streams
from gptbert.io.standard_output import StandardOutput, StandardOutputError

Settings = TypeVar("Settings")

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: run the same command again to resume


def run_command(
    settings: type[Settings],
    function: Callable[[Settings], None],
    arguments: Sequence[str] | None = None,
    *,
    under_torchrun: bool = False,
) -> None:
    """Parse the command line into `settings`, call `function` with it, and end the process.

    The exit status is 0 on success, 2 for a command line that cannot be parsed, 73 for an output that another process
    is writing, 1 for other unusable input, for output that cannot be written and for a run that lost a process,
    `STOPPED` for a run that a signal stopped at a checkpoint, 130 after Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP at other
    times, all of which clean up, and 141 when nobody reads what it prints any more. Errors common to all processes are
    printed by the first of each host; errors of a single process by that process, with its rank.

    Args:
        settings: a dataclass.
        function: what the command does.
        arguments: None takes those of this process.
        under_torchrun: it may be one of several processes; other commands ignore torchrun's variables, which a job's
            shell may have left over.
    """
    provide_streams()
    if not under_torchrun:
        environment.drop("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if environment.text("LOCAL_RANK") is None:
        # under torchrun, SIGTERM must end a process even if it waits in a collective
        # others: a batch system's end and its warning; a closed terminal, which nohup has a command ignore
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, signal.default_int_handler)
    try:
        with printing():
            parsed = parse(settings, arguments)
        _check_paths(parsed)
    except InputError as error:
        _fail(str(error), 1)
    try:
        with printing():
            function(parsed)
    except SharedError as error:
        _fail(str(error), error.status)
    except (InputError, LostProcessError) as error:
        who = f"rank {rank}: " if (rank := environment.text("RANK") or "").isdecimal() else ""
        _fail(f"{who}{error}", getattr(error, "status", 1), by_all=True)
    except StoppedError as error:
        _end(str(error) if _speaks() else "", STOPPED)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except Exception as error:
        _end_if_of_several(error)
        raise
    if environment.text("RANK"):
        _end("", 0)


def parse(settings: type[Settings], arguments: Sequence[str] | None = None) -> Settings:
    """Parse the command line into `settings`; prints one line and exits with 2 if tyro finds a mistake.

    Flags may come from a file (`gptbert.io.run_file`); those on the command line count more.
    """
    own = list(map(with_home, sys.argv[1:] if arguments is None else arguments))
    file = named_file(settings, own)
    if (twice := repeated(own)) and _speaks():
        log(f"given more than once, where the last one counts: {', '.join(twice)}")
    output, errors = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            parsed: Any = tyro.cli(settings, args=[*(file.arguments if file else []), *own], use_underscores=True)
        return dataclasses.replace(parsed, **{FLAG: None}) if file else parsed
    except InputError as error:
        if file is None:
            raise
        raise InputError(f"{error}{file.origin(str(error), own)}") from None
    except SystemExit as end:
        if end.code in {0, None}:  # --help
            if _speaks():
                print(_refilled(output.getvalue()), flush=True)
            raise
        message = switch_with_value(settings, own) or _one_line(errors.getvalue())
        _fail(message + (file.origin(message, own) if file else ""), 2)


def _check_paths(settings: Any) -> None:
    """Refuse paths that cannot be looked up, as without permission: from Python 3.14 on, `exists` says of them no.

    Raises:
        InputError: names the path; one that is not there is left to the command.
    """
    for value in vars(settings).values():
        for path in value if isinstance(value, list | tuple) else [value]:
            if isinstance(path, Path):
                try:
                    os.stat(f"{path}/.")  # noqa: PTH116  in a folder, too, which pathlib would leave out
                except (FileNotFoundError, NotADirectoryError):
                    pass
                except OSError as error:
                    raise InputError(f"{path}: {error.strerror}") from error


@contextlib.contextmanager
def printing() -> Iterator[None]:
    """Context manager for what prints: where standard output cannot be written, end the process.

    Without a word and with status 141 if nobody reads it any more (`| head`); with a line and status 1 otherwise, as on
    a full disk.
    """
    output: Any = StandardOutput(sys.stdout)
    try:
        with contextlib.redirect_stdout(output):
            yield
            output.flush()
    except StandardOutputError as error:
        sys.stdout = Lasting(sys.stdout)  # what waits in it must not fail again at the end
        if isinstance(error.__cause__, BrokenPipeError):
            _end("", 128 + signal.SIGPIPE)
        _fail(str(error), 1, by_all=True)


def make_callable(module: str, function: Callable[..., Any]) -> None:
    """Let a command's module be called as a function of the Python API that has the same name.

    `from gptbert import train` gives the module `gptbert.train`, into whose package Python puts it as soon as anything
    imports it. A function of that name would hide the module, or be hidden by it, depending on what came first.

    Args:
        module: its `__name__`.
        function: what calling the module calls.
    """

    class CallableModule(ModuleType):
        def __call__(self, *arguments: Any, **settings: Any) -> Any:
            return function(*arguments, **settings)

    sys.modules[module].__class__ = CallableModule
    sys.modules[module].__signature__ = inspect.signature(function)  # type: ignore[attr-defined]  # for help and completion


def _one_line(box: str) -> str:
    """The text of tyro's error box, without borders, title and pointers to the help."""
    parts: list[list[str]] = [[]]
    for line in (line.strip("│").rstrip(" │") for line in box.splitlines()):
        if re.fullmatch("[─-]{10,}", line.strip()):
            parts.append([])
        elif line.strip() and line.lstrip()[0] not in "╭╰":
            parts[-1].append(line)
    if "╭" not in box:  # without box characters in the terminal's encoding, the title is a separate part
        parts = parts[1:]
    messages = []
    for part in parts:
        first = part[0].lstrip()
        if first.startswith("Missing from"):
            messages.append("missing " + ", ".join(_missing(part)))
        elif not first.startswith(("For full helptext", "Argument helptext")):
            messages.append(" ".join(line.strip() for line in part))
    return "; ".join(messages) + " (see --help)"


def _refilled(text: str) -> str:
    """Tyro's help with each description as one paragraph; tyro keeps some of the line breaks of our docstrings."""
    lines = [line.rstrip() for line in text.splitlines()]
    first = next((line for line in lines if line.startswith("  -h, --help ")), None)
    if first is None:
        return text
    column = first.index("show this help")
    width = max(map(len, lines)) - column

    def filled(found: re.Match[str]) -> str:
        words = " ".join(found[2].split())
        return found[1] + f"\n{' ' * column}".join(textwrap.wrap(words, width, break_on_hyphens=False))

    descriptions = rf"^(.{{{column - 2}}}  )(\S.*(?:\n {{{column}}}\S.*)*)"
    return re.sub(descriptions, filled, "\n".join(lines), flags=re.MULTILINE)


def _missing(lines: list[str]) -> list[str]:
    """The arguments in tyro's list of missing ones: indented further than its title, and less than descriptions."""
    indents = [len(line) - len(line.lstrip()) for line in lines]
    of_names = min((indent for indent in indents if indent > indents[0]), default=None)
    return [line.split()[0] for line, indent in zip(lines, indents, strict=True) if indent == of_names]


def _fail(message: str, status: int, by_all: bool = False) -> NoReturn:
    _end(f"error: {message}" if by_all or _speaks() else "", status)


def _end_if_of_several(error: Exception) -> None:
    """After an error that no one foresaw: end one of several processes as `_end` does, with the traceback."""
    if environment.text("RANK"):
        with contextlib.redirect_stderr(Lasting(sys.stderr)):
            sys.excepthook(type(error), error, error.__traceback__)  # torch's, which names the rank
        _exit(1)


def _end(message: str, status: int) -> NoReturn:
    """End the process; one of several processes skips interpreter shutdown.

    In shutdown, a gloo thread that frees the last collective's tensors would find no interpreter and abort the process,
    and an nccl group that was not destroyed may wait for other processes.
    """
    if message:
        print(message, file=Lasting(sys.stderr))
    if environment.text("RANK"):
        if status and not message:
            time.sleep(2)  # torchrun kills all once the first ends, including one yet to print the reason
        _exit(status)
    sys.exit(status)


def _exit(status: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        Lasting(stream).flush()
    os._exit(status)


def _speaks() -> bool:
    return environment.text("RANK") is None or (environment.text("LOCAL_RANK") or "0") == "0"
