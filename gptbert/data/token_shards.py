"""A shard, one file of a token store: written, opened and checked; and the names of a set of shards."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gptbert.errors import InputError, first_line

FORMAT = "gptbert-tokens-1"
SLICE = 2**16  # documents per piece when scanning all: 512 KB of offsets, which fit a cache
_HEADER_BYTES = 1 << 16


@dataclass(frozen=True)
class Shard:
    """The contents of a shard file; see `gptbert.data.token_store`.

    Attributes:
        tokens: [num_tokens], of an unsigned type; memory-mapped if read from a file.
        document_offsets: [num_documents + 1] int64, likewise.
        vocab_size: ids are below this number.
        tokenizer_hash: hash of the tokenizer that wrote it.
        num_words: whitespace-separated words of its documents, or None if not counted.
    """

    tokens: np.ndarray
    document_offsets: np.ndarray
    vocab_size: int
    tokenizer_hash: str
    num_words: int | None


def write_shard(shard: Shard, file: Path) -> None:
    """Write a file deterministically: equal contents give equal bytes.

    Raises:
        OSError, SafetensorError: writing fails.
    """
    metadata = {"format": FORMAT, "vocab_size": str(shard.vocab_size), "tokenizer_hash": shard.tokenizer_hash}
    if shard.num_words is not None:
        metadata["num_words"] = str(shard.num_words)
    save_file({"tokens": shard.tokens, "document_offsets": shard.document_offsets}, file, metadata=metadata)
    with file.open("r+b") as handle:  # safetensors orders metadata arbitrarily: rewrite the header in a fixed order
        size = int.from_bytes(handle.read(8), "little")
        header = json.loads(handle.read(size))
        header["__metadata__"] = metadata
        handle.seek(8)
        handle.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size))


def open_shard(file: Path) -> Shard:
    """Memory-map a file.

    Raises:
        InputError: it is of a different kind, truncated or damaged.
    """
    _check_header(file)
    try:
        with safe_open(file, framework="pt") as handle:  # framework="pt" memory-maps the file, "numpy" copies it
            metadata = handle.metadata() or {}
            if metadata.get("format") != FORMAT or not {"tokens", "document_offsets"} <= set(handle.keys()):
                raise InputError(f"token file {file}: not written by tokenize_scripts/tokenize_corpus.py")
            tokens = handle.get_tensor("tokens").numpy()
            offsets = handle.get_tensor("document_offsets").numpy()
            vocab_size, digest = metadata["vocab_size"], metadata["tokenizer_hash"]
            num_words = metadata.get("num_words")  # absent in older files
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = first_line(error)
        raise InputError(f"token file {file}: damaged or cut short ({reason}); tokenize the corpus again") from error
    if tokens.ndim != 1 or tokens.dtype.kind != "u" or offsets.ndim != 1 or offsets.dtype != np.int64:
        raise InputError(f"token file {file}: its arrays have unexpected types; tokenize the corpus again")
    if not re.fullmatch("[1-9][0-9]{0,9}", vocab_size):
        raise InputError(f"token file {file}: its vocab_size is {vocab_size[:20]!r}; tokenize the corpus again")
    if num_words is not None and not re.fullmatch("[0-9]{1,18}", num_words):
        raise InputError(f"token file {file}: its num_words is {num_words[:20]!r}; tokenize the corpus again")
    if not _fits(offsets, len(tokens)):
        raise InputError(f"token file {file}: its document offsets do not fit its tokens; tokenize the corpus again")
    return Shard(tokens, offsets, int(vocab_size), digest, None if num_words is None else int(num_words))


def _check_header(file: Path) -> None:
    """Refuse headers larger than two arrays need: safetensors would parse them into objects many times their size."""
    _check_is_file(file)
    with file.open("rb") as handle:
        if int.from_bytes(handle.read(8), "little") > _HEADER_BYTES:
            raise InputError(f"token file {file}: not written by tokenize_scripts/tokenize_corpus.py")


def _check_is_file(file: Path) -> None:
    """Refuse pipes and devices, which may never end, and paths that cannot be read."""
    if not file.is_file():
        raise InputError(f"token file {file}: is not a file; tokenize the corpus again")


def _fits(offsets: np.ndarray, num_tokens: int) -> bool:
    """Whether offsets rise from 0 to the number of tokens; compared, since differences may overflow, slice by slice."""
    if not len(offsets) or offsets[0] != 0 or offsets[-1] != num_tokens:
        return False
    slices = (offsets[first : first + SLICE + 1] for first in range(0, len(offsets), SLICE))
    return all((part[1:] >= part[:-1]).all() for part in slices)


def _why_not_there(path: Path) -> str:
    """Which from Python 3.14 on `is_file` hides."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        return str(error.strerror)
    return "no such file (make one with tokenize_scripts/tokenize_corpus.py)"


def shard_files(path: Path) -> list[Path]:
    """The file itself, or all of its numbered shards in order.

    Raises:
        InputError: there is no such file, or a shard is missing.
    """
    if path.is_file():
        if path.stat().st_size == 0:
            raise InputError(f"token file {path}: the file is empty; tokenize the corpus again")
        return [path]
    if path.is_dir():
        raise InputError(f"token file {path}: is a folder; name the token file that tokenize_corpus.py wrote")
    shards = numbered_shards(path)
    if not shards:
        raise InputError(f"token file {path}: {_why_not_there(path)}")
    count = int(shards[0].stem.rpartition("-of-")[2])
    present = set(shards)
    for expected in (shard_name(path, i + 1, count) for i in range(count)):
        if expected not in present:
            raise InputError(f"token file {path}: its shard {expected.name} is missing; tokenize the corpus again")
    if len(shards) != count:
        raise InputError(f"token file {path}: shards of two different runs are there; tokenize the corpus again")
    return shards


def numbered_shards(path: Path) -> list[Path]:
    """Existing shards of this name, in order, even if the set is incomplete."""
    pattern = re.compile(rf"{re.escape(path.stem)}-(\d{{5,}})-of-\d{{5,}}{re.escape(path.suffix)}", flags=re.ASCII)
    if not path.parent.is_dir():
        return []
    found = ((pattern.fullmatch(file.name), file) for file in path.parent.iterdir())
    return [file for _, file in sorted((int(name[1]), file) for name, file in found if name)]


def shard_name(path: Path, number: int, count: int) -> Path:
    """File name of shard `number`, from 1, of `count`."""
    return path.with_name(f"{path.stem}-{number:05d}-of-{count:05d}{path.suffix}")


def is_safetensors(file: Path) -> bool:
    """Whether a file is safetensors: the header's length (8 bytes), then its JSON."""
    _check_is_file(file)
    with file.open("rb") as handle:
        return handle.read(9)[8:] == b"{"
