"""The tokenizer of an exported folder: transformers gives the ids that training saw."""

import json
from pathlib import Path

from tokenizers import Tokenizer

from gptbert.io.json_file import write_json
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
    prefix = (json.loads(content)["pre_tokenizer"] or {}).get("add_prefix_space")
    if prefix is not None:  # transformers 4 sets the pre-tokenizer's to its own default otherwise
        settings["add_prefix_space"] = prefix
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "special_tokens_map.json", special_tokens())


def special_tokens() -> dict[str, str]:
    """The special tokens by their roles in transformers."""
    roles = {"unk": UNK_ID, "bos": BOS_ID, "eos": EOS_ID, "pad": PAD_ID, "mask": MASK_ID, "cls": BOS_ID, "sep": EOS_ID}
    return {f"{role}_token": SPECIAL_TOKENS[token_id] for role, token_id in roles.items()}
