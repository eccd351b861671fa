"""The tokenizer file: loading it, its special tokens, and the hash that ties token files to it."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from gptbert.errors import InputError, first_line
from gptbert.io.json_file import read_json
from gptbert.text.special_tokens import MASK_ID, SPECIAL_TOKENS

_MOST_BYTES = 1 << 26  # twice the size of the largest published ones
_MOST_GROWTH = 10_000  # of a text's length by normalizers or decoders
_PROBE = "A text, 1 or 2.\n"


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a `tokenizers` JSON file and check that `<unk>` … `<mask>` have the ids 0 … 4.

    The file's settings for padding and truncation are disabled: rows are packed elsewhere.

    Raises:
        InputError: the file is missing, is not a tokenizer, numbers its special tokens differently, leaves gaps between
            its ids, or cannot encode.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"tokenizer {path}: no such file (train one with tokenize_scripts/train_tokenizer.py)")
    content = _read(path)
    if reason := _danger([content.get(key) for key in ("normalizer", "decoder")] if isinstance(content, dict) else []):
        raise InputError(f"tokenizer {path}: {reason}")
    with _library_errors(f"tokenizer {path}: not a tokenizers JSON file"):
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_padding()
        tokenizer.no_truncation()
    for token_id, token in enumerate(SPECIAL_TOKENS[: MASK_ID + 1]):
        if tokenizer.token_to_id(token) != token_id:
            raise InputError(
                f"tokenizer {path}: {token} has id {tokenizer.token_to_id(token)}, expected {token_id} "
                "(train one with tokenize_scripts/train_tokenizer.py)"
            )
    if (largest := max(tokenizer.get_vocab().values())) >= tokenizer.get_vocab_size():
        raise InputError(
            f"tokenizer {path}: has {tokenizer.get_vocab_size()} tokens, one of them with id {largest}; "
            "use one whose ids have no gaps"
        )
    with _library_errors(f"tokenizer {path}: cannot encode"):
        tokenizer.encode(_PROBE)
    return tokenizer


def ordinary_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids of all tokens except the special ones, in order."""
    special = {token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    return [token_id for token_id in range(MASK_ID + 1, tokenizer.get_vocab_size()) if token_id not in special]


def tokenizer_hash(path: str | Path) -> str:
    """SHA-256 of the tokenizer's JSON content, independent of whitespace and key order."""
    canonical = json.dumps(_read(Path(path)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _read(path: Path) -> Any:
    try:
        return read_json(path, _MOST_BYTES, unique_keys=True)  # the library may resolve duplicate keys differently
    except (OSError, ValueError) as error:
        raise InputError(f"tokenizer {path}: not a tokenizers JSON file ({first_line(error)})") from error


@contextmanager
def _library_errors(message: str) -> Iterator[None]:
    """Turn the library's errors into InputErrors: exceptions, and Rust panics, which are not `Exception`s."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{message} ({first_line(error)[:200]})") from error


def _danger(parts: list[Any]) -> str | None:
    """Why a normalizer or decoder could crash the process or exhaust its memory, which the library does not prevent."""
    growth = 1
    while parts:
        part = parts.pop()
        if isinstance(part, list):
            parts += part
        elif isinstance(part, dict):
            if "precompiled_charsmap" in part:  # a wrong length inside it aborts the process
                return "a normalizer of type Precompiled is not supported"
            for key in ("content", "prepend"):
                growth *= 1 + len(part[key]) if isinstance(part.get(key), str) else 1
            if growth > _MOST_GROWTH:
                return f"its normalizers or decoders could make a text more than {_MOST_GROWTH:,} times as long"
            parts += part.values()
    return None
