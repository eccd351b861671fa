"""A tokenizer without one of its parts: the space that it puts in front of a text, or the Unicode normal form.

The library applies a normalizer, and most splitters, to each stretch between special tokens, so a tokenizer that puts a
space in front of a text puts one behind each `<mask>` too: what is not a text's start is encoded without.

It normalizes a text character by character. Whether a text is in a normal form already, Python tells in a hundredth of
that time, and then it is encoded without, a tenth faster.
"""

import json
import unicodedata
from functools import cache
from typing import Any, Literal, get_args

import numpy as np
from tokenizers import Tokenizer

UnicodeForm = Literal["NFC", "NFD", "NFKC", "NFKD"]

_LOOKED_UP = 0x1FC00  # code points: the basic plane, and emoji


def without_prefix(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer that puts nothing in front of any stretch of a text: a copy, or the given one if it is such."""
    content = json.loads(tokenizer.to_str())
    changed = content | {key: _never(content[key]) for key in ("normalizer", "pre_tokenizer")}
    return tokenizer if changed == content else Tokenizer.from_str(json.dumps(changed))


def without_normal_form(tokenizer: Tokenizer) -> tuple[Tokenizer, UnicodeForm] | None:
    """A copy of a tokenizer without its normalizer, where that is only a Unicode normal form, and the form; else None.

    The copy gives the same ids for each text that `is_in_form`.
    """
    name = type(tokenizer.normalizer).__name__
    form: UnicodeForm | None = next((form for form in get_args(UnicodeForm) if form == name), None)
    if form is None:
        return None
    if not all(is_in_form(token.content, form) for token in tokenizer.get_added_tokens_decoder().values()):
        return None  # the library looks for their normalized names
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.normalizer = None
    return copy, form


def is_in_form(text: str, form: UnicodeForm) -> bool:
    """Whether a text is in a normal form, whatever version of Unicode the library has; False where this is not certain.

    Versions agree on a text whose characters Python's version has: a character's normal forms never change
    (https://unicode.org/policies/stability_policy.html). Other characters of the library's own may have forms.
    """
    return text.isascii() or (unicodedata.is_normalized(form, text) and _are_assigned(text))


def _never(part: Any) -> Any:
    """A normalizer or splitter, as in the file, without what goes in front."""
    if not isinstance(part, dict):
        return part
    if part["type"] == "Prepend":
        return None
    if part["type"] == "Sequence":
        key = "normalizers" if "normalizers" in part else "pretokenizers"
        return part | {key: [left for inner in part[key] if (left := _never(inner)) is not None]}
    if part.get("add_prefix_space"):
        return part | {"add_prefix_space": False}
    # "first" looks at where the stretch is in the text, which is right as long as it is the text
    return part | {"prepend_scheme": "never"} if part.get("prepend_scheme") == "always" else part


def _are_assigned(text: str) -> bool:
    code_points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    return bool(code_points.max() < _LOOKED_UP) and bool(_assigned()[code_points].all())


@cache
def _assigned() -> np.ndarray:
    """[_LOOKED_UP] bool: whether Python's version of Unicode has a character with this code point."""
    return np.array([unicodedata.category(chr(point)) != "Cn" for point in range(_LOOKED_UP)], bool)
