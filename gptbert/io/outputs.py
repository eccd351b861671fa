"""Outputs of commands: refused before any work if they cannot be meant, and published only when complete."""

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from gptbert.errors import InputError
from gptbert.io.files import fsync_file


def check_outputs(outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Refuse, before any work is done, outputs that are folders or would overwrite an input.

    Raises:
        InputError: names the output.
    """
    taken = {file.resolve() for file in inputs}
    for output in outputs:
        if output.is_dir():
            raise InputError(f"output {output}: is a folder; name a file")
        if output.resolve() in taken:
            raise InputError(f"output {output}: is also an input, which it would overwrite; name another file")


@contextmanager
def staged_outputs(*outputs: Path, what: str = "output") -> Iterator[Sequence[Path]]:
    """Give paths to write to, and move them to `outputs`, fsynced and all together, when the block ends well.

    After an exception nothing is left, not even a new folder, and older files under the same names are untouched.

    Args:
        outputs: files of one folder, which is made if need be.
        what: names them in messages, such as a flag.

    Yields:
        One path for each output, in a hidden folder on the same disk.

    Raises:
        InputError: the folder cannot be written, or the disk is full.
    """
    target = outputs[0].absolute().parent
    nearest = next(folder for folder in (target, *target.parents) if folder.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=f".{outputs[0].name}.", dir=nearest) as folder:
            staged = [Path(folder, output.name) for output in outputs]
            yield staged
            for file in staged:
                fsync_file(file)
            target.mkdir(parents=True, exist_ok=True)
            for file, output in zip(staged, outputs, strict=True):
                file.replace(output)
    except OSError as error:
        raise InputError(f"{what} {outputs[0]}: cannot be written ({error.strerror})") from error
