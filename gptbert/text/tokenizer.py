"""The tokenizer file: loading it, its special tokens, and the hash that ties token files to it.

A file can ask for more than training does: to encode a text differently each time (BPE dropout), to cut or pad it, to
put tokens around it, to drop characters that it does not know, or to take a literal "<mask>" for the token.
`load_tokenizer` undoes all of that, in one place, so that training, the commands after it and exported folders give the
same ids.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, processors

from gptbert.errors import InputError, first_line
from gptbert.text.special_tokens import BOS_ID, MASK_ID, SPECIAL_TOKENS, UNK_ID
from gptbert.text.tokenizer_file import danger, inserted_texts, may_make, read_tokenizer_file

_PROBE = "A text, 1 or 2.\n"
_MOST_SPECIAL = 10_000
_RARE = "ĳ 漢 \N{GRINNING FACE}\0"  # not in most vocabularies
_SAMPLING = ("dropout", "alpha", "nbest_size")  # of BPE and Unigram: one of several encodings is drawn


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a `tokenizers` JSON file, normalized: a text has one encoding, uncut, with `<s>` in front and none behind.

    Special tokens are those that the file marks as special, and by name `SPECIAL_TOKENS` and the model's token for
    unknown text, whatever the file says of them. In a text, they are parsed exactly as written, unless
    `encode_special_tokens` is set: then they are plain text.

    Raises:
        InputError: the file is missing, is not a tokenizer, numbers `<unk>` … `<mask>` differently than 0 … 4, has ids
            with gaps, contradicts itself, or cannot encode every text.
    """
    content, tokenizer = _open(Path(path))
    for token_id, token in enumerate(SPECIAL_TOKENS[: MASK_ID + 1]):
        if (found := tokenizer.token_to_id(token)) != token_id:
            reason = f"has no {token}, expected with id" if found is None else f"{token} has id {found}, expected"
            raise InputError(
                f"tokenizer {path}: {reason} {token_id} (train one with tokenize_scripts/train_tokenizer.py)"
            )
    _check_ids(path, content, tokenizer)
    if (unknown := _unknown_token(tokenizer, content)) in SPECIAL_TOKENS[BOS_ID : MASK_ID + 1]:
        raise InputError(f"tokenizer {path}: gives {unknown} for text that it does not know, expected <unk>")
    with library_errors(f"tokenizer {path}: cannot encode"):
        _check_names(path, tokenizer)
        _encode_alike(tokenizer)  # before the first text: a BPE model remembers the words that it has encoded
        tokenizer.encode(_PROBE)
        _normalize(tokenizer, content)
        names = list(special_names(tokenizer).values())
        if len(names) > _MOST_SPECIAL:
            raise InputError(f"tokenizer {path}: has {len(names):,} special tokens, more than {_MOST_SPECIAL:,}")
        if word := next((name for name in names if not name[1:] or name.isalnum() or name.isspace()), None):
            raise InputError(
                f"tokenizer {path}: its special token {word!r} is in ordinary texts, where transformers would take it "
                'for special; mark it with "special": false, or give it a name such as <end>'
            )
        if put := next((name for text in inserted_texts(content) for name in names if name in text), None):
            raise InputError(f"tokenizer {path}: its normalizer puts {put} into texts, which would be a special token")
        if may_make(content, names):
            _separate_literals(tokenizer, names)
        tokenizer = Tokenizer.from_str(tokenizer.to_str())  # the library keeps former settings of added tokens
        _check_added_tokens(path, tokenizer)
        tokenizer.encode(_PROBE + _RARE)
        if literal := _parsed_literal(tokenizer, content):
            raise InputError(f"tokenizer {path}: makes a special token of the text {literal!r}, whatever its settings")
    return tokenizer


def special_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids of the special tokens of a loaded tokenizer, ascending."""
    return tuple(special_names(tokenizer))


def special_names(tokenizer: Tokenizer) -> dict[int, str]:
    """The special tokens of a tokenizer by their ids, ascending, as texts have them (`id_to_token` normalizes them)."""
    added = sorted(tokenizer.get_added_tokens_decoder().items())
    return {number: token.content for number, token in added if token.special}


def ordinary_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids of all tokens except the special ones, ascending."""
    return sorted(set(range(tokenizer.get_vocab_size())).difference(special_ids(tokenizer)))


def unknown_id(tokenizer: Tokenizer) -> int | None:
    """The id that a loaded tokenizer gives for what its vocabulary lacks; None if there is none."""
    unigram = isinstance(tokenizer.model, models.Unigram)  # its token is only in the file
    token = _unknown_token(tokenizer, json.loads(tokenizer.to_str()) if unigram else {"model": {}})
    return None if token is None else tokenizer.token_to_id(token)


def tokenizer_hash(path: str | Path) -> str:
    """SHA-256 of the tokenizer's JSON content, independent of whitespace and key order."""
    canonical = json.dumps(read_tokenizer_file(Path(path)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def are_same(path: str | Path, other: str | Path) -> bool:
    """Whether two files give the same ids: their contents are equal, or become so when they are loaded."""
    if tokenizer_hash(path) == tokenizer_hash(other):
        return True
    return load_tokenizer(path).to_str() == load_tokenizer(other).to_str()


def notes(path: str | Path, tokenizer: Tokenizer) -> list[str]:
    """What someone who encodes a corpus with this file should know, in sentences without a subject; usually nothing.

    Args:
        path: a tokenizer's file.
        tokenizer: it, loaded.
    """
    content, found = read_tokenizer_file(Path(path)), []
    settings = [name for name in _SAMPLING if content["model"].get(name)]
    settings += [name for name in ("truncation", "padding") if content.get(name)]
    if content.get("post_processor") not in (None, json.loads(bos_template().__getstate__())):
        _, as_written = _open(Path(path))
        _encode_alike(as_written)
        plain = as_written.encode(_PROBE, add_special_tokens=False).ids
        if as_written.encode(_PROBE).ids not in (plain, [BOS_ID, *plain]):
            settings.append("the tokens that it puts around a text")
    if settings:
        found.append(f"is used without {', '.join(settings)}")
    kept = tokenizer.decode(tokenizer.encode(_PROBE, add_special_tokens=False).ids, skip_special_tokens=False)
    if _PROBE not in kept:
        found.append(f"does not keep every text: {_PROBE!r} becomes {kept!r}")
    return found


def _open(path: Path) -> tuple[Any, Tokenizer]:
    """The file's content, and the tokenizer as it is written, but for padding and truncation."""
    content = read_tokenizer_file(path)
    if reason := danger(content):
        raise InputError(f"tokenizer {path}: {reason}")
    with library_errors(f"tokenizer {path}: not a tokenizers JSON file"):
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_padding()
        tokenizer.no_truncation()
    return content, tokenizer


def _check_ids(path: str | Path, content: Any, tokenizer: Tokenizer) -> None:
    """Refuse ids with gaps, ids of two tokens, and tokens that the file numbers in two ways."""
    size, ids = tokenizer.get_vocab_size(), sorted(tokenizer.get_vocab().values())
    if ids[-1] >= size:
        raise InputError(
            f"tokenizer {path}: has {size} tokens, one of them with id {ids[-1]}; use one whose ids have no gaps"
        )
    if ids != list(range(size)):
        twice = next(first for first, second in pairwise(ids) if first == second)
        raise InputError(f"tokenizer {path}: has two tokens with the id {twice}")
    for token in content.get("added_tokens") or []:
        if (number := tokenizer.token_to_id(token["content"])) != token["id"]:
            raise InputError(
                f"tokenizer {path}: {token['content']!r} has id {token['id']} in added_tokens and {number} in its "
                "vocabulary"
            )


def _check_names(path: str | Path, tokenizer: Tokenizer) -> None:
    """Refuse added tokens that the library looks for as an empty text: it fails, or takes all memory."""
    normalizer = tokenizer.normalizer
    for token in tokenizer.get_added_tokens_decoder().values():
        if normalizer and token.normalized and not normalizer.normalize_str(token.content):
            raise InputError(
                f"tokenizer {path}: nothing is left of its added token {token.content!r} when normalized; mark it with "
                '"normalized": false, or remove it'
            )


def _check_added_tokens(path: str | Path, tokenizer: Tokenizer) -> None:
    """Refuse added tokens that the library takes at random, or fails on in some texts."""
    added = tokenizer.get_added_tokens_decoder().values()
    normalizer, seen = tokenizer.normalizer, dict[str, str]()
    for token in added:
        text = token.content
        if normalizer and token.normalized and not token.special:
            text = normalizer.normalize_str(text)
            if (other := seen.setdefault(text, token.content)) != token.content:
                raise InputError(
                    f"tokenizer {path}: its added tokens {other!r} and {token.content!r} are both {text!r} when "
                    "normalized, so a text has one or the other at random; remove one"
                )
        if text.isspace() and token.lstrip and not token.rstrip:  # of which nothing is left where the other one was
            same = (other for other in added if other.rstrip and other.normalized == token.normalized)
            if before := next(same, None):
                raise InputError(
                    f"tokenizer {path}: its added tokens {before.content!r} and {token.content!r} both take the "
                    'whitespace between them, where the library fails; mark the second with "lstrip": false'
                )


def _normalize(tokenizer: Tokenizer, content: Any) -> None:
    """Name the special tokens, and put `<s>` alone around a text; a tokenizer of train_tokenizer.py stays as it is."""
    own = special_names(tokenizer).values()
    names = (name for name in (*own, *SPECIAL_TOKENS, _unknown_token(tokenizer, content)) if name is not None)
    numbered = [(tokenizer.token_to_id(name), name) for name in names]
    known = {number: name for number, name in numbered if number is not None}
    tokenizer.add_special_tokens(
        [AddedToken(known[number], normalized=False, special=True) for number in sorted(known)]
    )
    tokenizer.post_processor = bos_template()


def bos_template() -> processors.TemplateProcessing:
    """The post-processor that puts `<s>` in front of a text."""
    start = SPECIAL_TOKENS[BOS_ID]
    return processors.TemplateProcessing(
        single=f"{start} $A", pair=f"{start} $A {start} $B", special_tokens=[(start, BOS_ID)]
    )


def _separate_literals(tokenizer: Tokenizer, names: Sequence[str]) -> None:
    """Split special tokens' names that could reach the model in one piece, at a text's start or elsewhere."""
    own = tokenizer.pre_tokenizer
    if own and not any(name in piece for name in names for piece, _ in own.pre_tokenize_str(name)):
        return
    literals = [re.escape(name[0]) + f"(?={re.escape(name[1:])})" for name in names]
    split = pre_tokenizers.Split(Regex("|".join(literals)), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([own, split]) if own else split


def _encode_alike(tokenizer: Tokenizer) -> None:
    """Give every text one encoding, without gaps."""
    model = tokenizer.model
    for name in _SAMPLING:
        if getattr(model, name, None):
            setattr(model, name, None)
    if getattr(model, "unk_token", "") is None:  # a BPE model, which would leave out what it does not know
        model.unk_token = SPECIAL_TOKENS[UNK_ID]


def _unknown_token(tokenizer: Tokenizer, content: Any) -> str | None:
    """The token that the model gives for what it does not know: named, or in a Unigram model by its id."""
    token_id = content["model"].get("unk_id")
    if type(token_id) is int and 0 <= token_id < len(content["model"]["vocab"]):
        return content["model"]["vocab"][token_id][0]
    return getattr(tokenizer.model, "unk_token", None)


def _parsed_literal(tokenizer: Tokenizer, content: Any) -> str | None:
    """The first text in which a special token's name gives this token even as plain text."""
    unknown = {SPECIAL_TOKENS[UNK_ID], _unknown_token(tokenizer, content)}
    tokenizer.encode_special_tokens = True
    try:
        for number, name in special_names(tokenizer).items():
            for text in (name, f"{name} a {name} a{name}a") if name not in unknown else ():
                if number in tokenizer.encode(text, add_special_tokens=False).ids:
                    return text
    finally:
        tokenizer.encode_special_tokens = False
    return None


@contextmanager
def library_errors(message: str) -> Iterator[None]:
    """Turn the library's errors into InputErrors: exceptions, and Rust panics, which are not `Exception`s."""
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{message} ({first_line(error)[:200]})") from error
