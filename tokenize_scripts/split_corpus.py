"""Split a corpus: `python tokenize_scripts/split_corpus.py --input corpus --output_dir split`."""

import gzip
import io
import json
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TextIO

from gptbert.command_line import run_command
from gptbert.errors import InputError
from gptbert.io.outputs import check_outputs, staged_outputs
from gptbert.text.corpus import Corpus, CorpusConfig
from gptbert.text.tally import close

SIDES = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class SplitConfig(CorpusConfig):
    """Split documents into train, validation and test by a hash of their text: equal texts go to the same split."""

    output_dir: Path
    """Folder for train.jsonl, validation.jsonl and test.jsonl; created if needed."""
    valid_fraction: float = 0.05
    """Fraction of the documents (0 to 1) that goes to validation."""
    test_fraction: float = 0.05
    """Fraction of the documents (0 to 1) that goes to the test set; it does not affect the validation set."""
    gzip: bool = False
    """Compress the three files (train.jsonl.gz and so on)."""


def split_corpus(config: SplitConfig) -> None:
    """Write every document to its split's file, as a JSON object with a `text`.

    Raises:
        InputError: a flag, the input or the output cannot be used.
    """
    for flag, fraction in (("valid_fraction", config.valid_fraction), ("test_fraction", config.test_fraction)):
        if not 0 <= fraction < 1:
            raise InputError(f"--{flag}={fraction}: must be at least 0 and below 1")
    if config.valid_fraction + config.test_fraction >= 1:
        total = config.valid_fraction + config.test_fraction
        raise InputError(f"--valid_fraction and --test_fraction: are {total:g} together and leave nothing to train on")
    corpus = Corpus(config)
    outputs = [config.output_dir / f"{side}.jsonl{'.gz' if config.gzip else ''}" for side in SIDES]
    check_outputs(outputs, corpus.files)
    counts = dict.fromkeys(SIDES, 0)
    with staged_outputs(*outputs) as staged:
        with ExitStack() as stack:
            files = {side: _open_output(file, stack) for side, file in zip(SIDES, staged, strict=True)}
            for text in corpus:
                side = side_of(text, config.valid_fraction, config.test_fraction)
                counts[side] += 1
                files[side].write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        corpus.require_documents()
    sides = ", ".join(f"{count:,} {side}" for side, count in counts.items())
    fractions = {"validation": config.valid_fraction, "test": config.test_fraction, "train": 1}
    empty = [f"no document went to {side}" for side, fraction in fractions.items() if fraction and not counts[side]]
    close(
        f"wrote {sides} to {config.output_dir}, from {corpus.tally.counts()}",
        [corpus.tally.figures()],
        corpus.warnings() + empty + _inside_input(config),
    )


def _inside_input(config: SplitConfig) -> list[str]:
    """A warning if the outputs lie where the next reading of a folder finds them."""
    output = config.output_dir.resolve()
    folders = [folder for folder in config.input if folder.is_dir() and output.is_relative_to(folder.resolve())]
    return [
        f"--output_dir {config.output_dir} is in --input {folder}: reading that again would read its documents twice"
        for folder in folders
    ]


def side_of(text: str, valid_fraction: float, test_fraction: float) -> str:
    """A document's split: train, validation or test; a function of its text and the two fractions alone."""
    # Uniform in [0, 1), and exact as a float.
    place = int.from_bytes(blake2b(text.encode(), digest_size=6).digest()) / 2**48
    if place < valid_fraction:
        return "validation"
    # From the other end, so that the size of one split does not shift the other.
    return "test" if place >= 1 - test_fraction else "train"


def _open_output(file: Path, stack: ExitStack) -> TextIO:
    stream = stack.enter_context(file.open("wb"))
    if file.suffix == ".gz":
        # No name and no timestamp inside: the same documents give the same file.
        stream = stack.enter_context(gzip.GzipFile(filename="", mode="wb", fileobj=stream, compresslevel=6, mtime=0))
    return stack.enter_context(io.TextIOWrapper(stream, encoding="utf-8", newline="\n"))


def main() -> None:
    """Entry point."""
    run_command(SplitConfig, split_corpus)


if __name__ == "__main__":
    main()
