"""The space that a tokenizer puts in front of a text, and how to encode what is not a text's start without one.

The library applies a normalizer, and most splitters, to each stretch between special tokens, so a tokenizer that puts a
space in front of a text puts one behind each `<mask>` too.
"""

import json
from typing import Any

from tokenizers import Tokenizer


def without_prefix(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer that puts nothing in front of any stretch of a text: a copy, or the given one if it is such."""
    content = json.loads(tokenizer.to_str())
    changed = content | {key: _never(content[key]) for key in ("normalizer", "pre_tokenizer")}
    return tokenizer if changed == content else Tokenizer.from_str(json.dumps(changed))


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
