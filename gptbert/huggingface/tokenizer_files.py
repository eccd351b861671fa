"""The tokenizer of a folder for transformers: exported, it gives training's ids; imported, its files agree."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from gptbert.errors import InputError
from gptbert.io.json_file import read_object, write_json
from gptbert.text.special_tokens import BOS_ID, EOS_ID, MASK_ID, PAD_ID, SPECIAL_TOKENS, UNK_ID


def write_tokenizer_files(tokenizer: Tokenizer, folder: Path, model_max_length: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json.

    Args:
        tokenizer: from `load_tokenizer`, which undoes what its file asks for and training does not do; a copy of the
            file would do it again in transformers.
        folder: exists.
        model_max_length: transformers warns of longer texts.
    """
    content = tokenizer.to_str(pretty=True)
    (folder / "tokenizer.json").write_text(content, encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special_tokens(),
        "model_max_length": model_max_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    prefix = _prefix(tokenizer)
    if prefix is not None:  # transformers 4 sets the pre-tokenizer's to its own default otherwise
        settings["add_prefix_space"] = prefix
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "special_tokens_map.json", special_tokens())


def special_tokens() -> dict[str, str]:
    """The special tokens by their roles in transformers."""
    roles = {"unk": UNK_ID, "bos": BOS_ID, "eos": EOS_ID, "pad": PAD_ID, "mask": MASK_ID, "cls": BOS_ID, "sep": EOS_ID}
    return {f"{role}_token": SPECIAL_TOKENS[token_id] for role, token_id in roles.items()}


def check_tokenizer_files(tokenizer: Tokenizer, path: Path) -> None:
    """Compare a tokenizer with what transformers' files beside it say of its tokens.

    Args:
        tokenizer: from `load_tokenizer`.
        path: its tokenizer.json.

    Raises:
        InputError: they differ, so that transformers would give other ids than this trainer; names both files.
    """
    roles = special_tokens()
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        file = path.with_name(name)
        said = read_object(file) if file.is_file() else {}
        for role in ("unk_token", "bos_token", "eos_token", "pad_token", "mask_token"):
            if (token := _token(said.get(role))) not in (None, roles[role]):
                raise InputError(f"{file} says that {role} is {token!r}, and in tokenizer {path} it is {roles[role]!r}")
        for token, number in said.items() if name == "added_tokens.json" else _numbered(said):
            if (found := tokenizer.token_to_id(token)) != number:
                other = "has no such token" if found is None else f"gives it {found}"
                raise InputError(f"{file} says that {token!r} has the id {number}, and tokenizer {path} {other}")
        for key in ("additional_special_tokens", "extra_special_tokens"):
            for token in map(_token, said[key] if isinstance(said.get(key), list) else ()):
                if token is not None and tokenizer.token_to_id(token) is None:
                    raise InputError(f"{file} says that {token!r} is a special token, and tokenizer {path} has no such")
        if (prefix := said.get("add_prefix_space")) is not None and _prefix(tokenizer) not in (None, prefix):
            raise InputError(
                f"{file} says {str(prefix).lower()} of add_prefix_space, and the pre_tokenizer of tokenizer {path} "
                f"{str(not prefix).lower()}"
            )


def _token(value: Any) -> str | None:
    """A token as transformers' files have it: its text, or an object with it."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _numbered(settings: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Tokens and ids of `added_tokens_decoder`."""
    decoder = settings.get("added_tokens_decoder")
    for number, value in decoder.items() if isinstance(decoder, dict) else ():
        if (token := _token(value)) is not None and number.isdecimal():
            yield token, int(number)


def _prefix(tokenizer: Tokenizer) -> bool | None:
    """Whether the pre-tokenizer puts a space in front of texts; None if it has no such setting of its own."""
    return (json.loads(tokenizer.to_str())["pre_tokenizer"] or {}).get("add_prefix_space")
