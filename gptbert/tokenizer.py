"""The tokenizer file: loading it, its special tokens, and the hash that ties token files to it."""

import hashlib
import json
from pathlib import Path

from tokenizers import Tokenizer

from gptbert.errors import InputError, first_line

UNK_ID, BOS_ID, EOS_ID, PAD_ID, MASK_ID = range(5)
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", "<mask>", *(f"<special_{i}>" for i in range(11)))


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a `tokenizers` JSON file and check that `<unk>` … `<mask>` have the ids 0 … 4.

    Raises:
        InputError: the file is missing, is not a tokenizer, or numbers its special tokens differently.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"tokenizer {path}: no such file (train one with tokenize_scripts/train_tokenizer.py)")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:
        raise InputError(f"tokenizer {path}: not a tokenizers JSON file ({first_line(error)})") from error
    for token_id, token in enumerate(SPECIAL_TOKENS[: MASK_ID + 1]):
        if tokenizer.token_to_id(token) != token_id:
            raise InputError(
                f"tokenizer {path}: {token} has id {tokenizer.token_to_id(token)}, expected {token_id} "
                "(train one with tokenize_scripts/train_tokenizer.py)"
            )
    return tokenizer


def tokenizer_hash(path: str | Path) -> str:
    """SHA-256 of the tokenizer's JSON content, independent of white space and key order."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"tokenizer {path}: cannot be read as JSON ({first_line(error)})") from error
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
