"""Outputs of commands, files and folders: mistakes are refused before any work, and each appears only when complete."""

import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from safetensors import SafetensorError

from gptbert.errors import InputError, first_line
from gptbert.io import names
from gptbert.io.files import fsync_file, publish
from gptbert.io.owner import owned

# What runs, saved models and exported ones consist of, besides weights.
_OF_A_MODEL = {
    *(names.RUN_CONFIG, names.RUN_FILE, names.OWNER, names.METRICS, names.SAMPLES, names.BEST),
    *(names.MODEL_CONFIG, names.TRAIN_CONFIG, names.TOKENIZER, names.MANIFEST, names.STEP, names.WORDS),
    *(names.TRAINING_STATE, "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"),
}


def check_outputs(outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Refuse, before any work is done, outputs that are folders or devices, or would overwrite an input or a model.

    Raises:
        InputError: an output is refused; names it.
    """
    taken = {file.resolve() for file in inputs}
    for output in outputs:
        if output.is_dir():
            raise InputError(f"output {output}: is a folder; name a file")
        if output.exists() and not output.is_file():  # which root's file would replace, for all programs
            raise InputError(f"output {output}: is a device or a pipe; name a file")
        if output.resolve() in taken:
            raise InputError(f"output {output}: is also an input, which it would overwrite; name another file")
        if output.exists() and _is_of_a_model(output):
            raise InputError(f"output {output}: is a file of the run or model in that folder; name another file")


def _is_of_a_model(file: Path) -> bool:
    """Whether a file is part of a run, a saved model or an exported one, by its name and those beside it."""
    beside = [{names.MODEL_CONFIG}, {names.RUN_CONFIG, names.TOKENIZER}]
    is_in_one = any(all((file.parent / name).exists() for name in each) for each in beside)
    return is_in_one and (file.name in _OF_A_MODEL or file.suffix in {".safetensors", ".py"})


@contextmanager
def staged_outputs(*outputs: Path, what: str = "output") -> Iterator[Sequence[Path]]:
    """Yield paths to write to; when the block succeeds, fsync them and move them all to `outputs`.

    After an exception nothing is left behind, not even a new folder, and older files of the same names are untouched.
    One process at a time may write an output.

    Args:
        outputs: files in one folder, which is created if needed.
        what: their name in messages, such as a flag.

    Yields:
        One path per output, in a hidden folder on the same disk.

    Raises:
        InputError: the folder cannot be written, the disk is full, or another process writes one of the outputs.
    """
    try:
        with owned_outputs(*outputs, what=what), staging_folder(outputs[0]) as folder:
            staged = [folder / output.name for output in outputs]
            yield staged
            for file in staged:
                fsync_file(file)
            for file, output in zip(staged, outputs, strict=True):
                file.replace(output)
    except OSError as error:
        raise InputError(f"{what} {outputs[0]}: cannot be written ({error.strerror})") from error


@contextmanager
def staging_folder(output: Path) -> Iterator[Path]:
    """A hidden folder beside an output that this process owns; deleted at the end, as are those of killed processes.

    Of a corpus these hold terabytes, which nobody sees.
    """
    beside = output.absolute().parent
    of_killed = re.compile(rf"\.{re.escape(output.name)}\.[a-z0-9_]{{8}}")  # as tempfile names them
    for leftover in [folder for folder in beside.iterdir() if of_killed.fullmatch(folder.name) and folder.is_dir()]:
        shutil.rmtree(leftover, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=beside))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def owned_outputs(*outputs: Path, what: str = "output") -> Iterator[None]:
    """Own output files while the block runs; their folder is there meanwhile, and stays if something is in it.

    Raises:
        OwnedError: another process owns one of them.
        OSError: their folder cannot be written.
    """
    with ExitStack() as stack:
        for output in sorted(outputs):
            stack.enter_context(owned(output.absolute().with_name(f".{output.name}.owner"), f"{what} {output}"))
        yield


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
