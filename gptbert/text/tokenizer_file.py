"""A tokenizer's JSON file as untrusted content: what it is, and whether the library can be given it."""

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from gptbert.errors import InputError, first_line
from gptbert.io.formats import format_of
from gptbert.io.json_file import read_json

_MOST_BYTES = 1 << 26  # twice the size of the largest published ones
_MOST_GROWTH = 10_000  # of a text's length by normalizers or decoders
_TRAIN_ONE = "train one with tokenize_scripts/train_tokenizer.py"
_EXPECTED = f"expected tokenizer.json, a file of the `tokenizers` library ({_TRAIN_ONE})"
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* \d+")  # bytes in base64, and their number
_START = 1 << 12  # bytes that are enough to recognize a file of another kind


def read_tokenizer_file(path: Path) -> Any:
    """The file's content, as Python objects.

    Raises:
        InputError: the file is missing, cannot be read, or is of another kind, which the message names if it is known.
    """
    if path.is_dir():
        way_on = f"name {path / 'tokenizer.json'}" if (path / "tokenizer.json").is_file() else _EXPECTED
        raise InputError(f"tokenizer {path}: is a folder; {way_on}")
    if not path.is_file():
        raise InputError(f"tokenizer {path}: no such file ({_TRAIN_ONE})")
    try:
        content = read_json(path, _MOST_BYTES, unique_keys=True)  # the library may resolve duplicate keys differently
    except (OSError, ValueError) as error:
        kind = _kind_of_other(path)
        reason = f"is {kind}; {_EXPECTED}" if kind else f"not a tokenizers JSON file ({first_line(error)})"
        raise InputError(f"tokenizer {path}: {reason}") from error
    if isinstance(content, dict) and "model" not in content and (kind := _kind_of_object(content)):
        raise InputError(f"tokenizer {path}: is {kind}; {_EXPECTED}")
    return content


def _kind_of_other(path: Path) -> str | None:
    """What a file is that is no JSON."""
    with path.open("rb") as file:
        start = file.read(_START)
    if format_of(start):
        return None  # which the error says
    if start.startswith(b"#version"):
        return "a list of merges (merges.txt), half of a tokenizer"
    lines = start.splitlines()[: -1 if len(start) == _START else None]  # the last one may be cut
    if lines and all(_TIKTOKEN.fullmatch(line) for line in lines):
        return "a list of tokens for tiktoken"
    if path.suffix == ".model" or (start[:1] == b"\n" and b"\0" in start):
        return "a SentencePiece model"
    if len(lines) > 1 and b"\0" not in start and all(len(line.split()) <= 2 and b"{" not in line for line in lines):
        return "a list of tokens (vocab.txt)"
    return None


def _kind_of_object(content: dict[str, Any]) -> str | None:
    """What a JSON object is that has no tokenizer's model."""
    if content.keys() & {"tokenizer_class", "added_tokens_decoder", "bos_token", "mask_token", "unk_token"}:
        return "transformers' settings of a tokenizer"
    if content.keys() & {"hidden_size", "model_type"}:
        return "the configuration of a model"
    if content and all(type(value) is int for value in content.values()):
        return "a vocabulary (vocab.json), half of a tokenizer"
    return None


def danger(content: Any) -> str | None:
    """Why a normalizer or decoder could crash the process or exhaust its memory, which the library does not prevent."""
    growth = 1
    for part in _parts(content, "normalizer", "decoder"):
        if "precompiled_charsmap" in part:  # a wrong length inside it aborts the process
            return "a normalizer of type Precompiled is not supported"
        for text in _inserted(part):
            growth *= 1 + len(text)
        if growth > _MOST_GROWTH:
            return f"its normalizers or decoders could make a text more than {_MOST_GROWTH:,} times as long"
    return None


def inserted_texts(content: Any) -> Iterator[str]:
    """What a tokenizer's normalizers put into texts: in place of others, or in front."""
    for part in _parts(content, "normalizer"):
        yield from _inserted(part)


def may_make(content: Any, names: Collection[str]) -> bool:
    """Whether a tokenizer's model gives a token of one of these names for its letters: by its vocabulary or merges."""
    model = content["model"]
    if "merges" not in model or model.get("ignore_merges"):
        return any(token in names for token in _tokens(model["vocab"]))
    prefix = model.get("continuing_subword_prefix") or ""
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
    return any(left + right.removeprefix(prefix) in names for left, right in pairs)


def _tokens(vocab: Any) -> Iterator[str]:
    """The tokens of a model's vocabulary: numbered, or with scores in a Unigram model."""
    yield from vocab if isinstance(vocab, dict) else (token for token, _ in vocab)


def _inserted(part: dict[str, Any]) -> list[str]:
    return [part[key] for key in ("content", "prepend") if isinstance(part.get(key), str)]


def _parts(content: Any, *names: str) -> Iterator[dict[str, Any]]:
    """The objects under these keys of a tokenizer, and those inside of them."""
    parts = [content.get(name) for name in names] if isinstance(content, dict) else []
    while parts:
        part = parts.pop()
        if isinstance(part, list):
            parts += part
        elif isinstance(part, dict):
            yield part
            parts += part.values()
