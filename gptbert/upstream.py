"""What upstream GPT-BERT left on people's disks: parameter names of checkpoints, and token files."""

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gptbert.config import ModelConfig
from gptbert.errors import InputError, first_line
from gptbert.model import position_bucket
from gptbert.tokenizer import BOS_ID

# our name → published name; {} stands for the layer
_NAMES = {
    "embedding.word_embedding.weight": "embedding.word_embedding.weight",
    "embedding.relative_embedding": "embedding.relative_embedding",
    "embedding.relative_layer_norm.weight": "embedding.relative_layer_norm.weight",
    "embedding.relative_layer_norm.bias": "embedding.relative_layer_norm.bias",
    "blocks.{}.attention.query_key.weight": "transformer.attention_layers.{}.in_proj_qk.weight",
    "blocks.{}.attention.query_key.bias": "transformer.attention_layers.{}.in_proj_qk.bias",
    "blocks.{}.attention.value_gate.weight": "transformer.attention_layers.{}.in_proj_vg.weight",
    "blocks.{}.attention.value_gate.bias": "transformer.attention_layers.{}.in_proj_vg.bias",
    "blocks.{}.attention.output.weight": "transformer.attention_layers.{}.out_proj.weight",
    "blocks.{}.attention.output.bias": "transformer.attention_layers.{}.out_proj.bias",
    "blocks.{}.feed_forward.up.weight": "transformer.mlp_layers.{}.mlp.1.weight",
    "blocks.{}.feed_forward.down.weight": "transformer.mlp_layers.{}.mlp.4.weight",
    "head.dense.weight": "classifier.nonlinearity.1.weight",
    "head.dense.bias": "classifier.nonlinearity.1.bias",
    "head.bias": "classifier.nonlinearity.5.bias",
}
_TO_PUBLISHED = {ours.replace("{}", "L"): published.replace("{}", "L") for ours, published in _NAMES.items()}
_FROM_PUBLISHED = {published: ours for ours, published in _TO_PUBLISHED.items()}
_TIED_WEIGHT = "classifier.nonlinearity.5.weight"
_BUFFER = "transformer.attention_layers.{}.position_indices"


def from_upstream(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published parameter names to this model's; buffers and the copy of the tied weight are dropped.

    Raises:
        InputError: a name belongs to no part of a GPT-BERT.
    """
    converted = {}
    for name, tensor in state_dict.items():
        name = name.removeprefix("module.").removeprefix("_orig_mod.")  # noqa: PLW2901  DDP's and compile's prefixes
        if name == _TIED_WEIGHT or name.endswith(".position_indices"):
            continue
        if alpha := re.fullmatch(r"transformer\.dwa_modules\.alphas\.(\d+)", name):
            layer, is_feed_forward = divmod(int(alpha[1]), 2)
            mix = "feed_forward_mix" if is_feed_forward else "attention_mix"
            converted[f"blocks.{layer}.{mix}.alpha"] = tensor
        else:
            converted[_rename(name, _FROM_PUBLISHED)] = tensor
    return converted


def to_upstream(state_dict: Mapping[str, Tensor], config: ModelConfig | None = None) -> dict[str, Tensor]:
    """This model's parameter names to the published ones, with the tied weight under both of its names.

    Args:
        state_dict: of a `GPTBert`.
        config: adds each layer's buffer of position buckets [M, M] int32, which upstream's strict loading expects.

    Raises:
        InputError: a name belongs to no part of a GPT-BERT.
    """
    converted = {}
    for name, tensor in state_dict.items():
        if alpha := re.fullmatch(r"blocks\.(\d+)\.(attention|feed_forward)_mix\.alpha", name):
            converted[f"transformer.dwa_modules.alphas.{2 * int(alpha[1]) + (alpha[2] == 'feed_forward')}"] = tensor
        else:
            converted[_rename(name, _TO_PUBLISHED)] = tensor
    converted[_TIED_WEIGHT] = converted["embedding.word_embedding.weight"]
    if config is not None:
        position = torch.arange(config.max_position_embeddings)
        buckets = position_bucket(position[:, None] - position[None, :], config) + config.position_bucket_size - 1
        for layer in range(config.num_hidden_layers):
            converted[_BUFFER.format(layer)] = buckets.int()
    return converted


def _rename(name: str, table: dict[str, str]) -> str:
    layer = re.search(r"(?<=\.)\d+(?=\.)", name)
    generic = name[: layer.start()] + "L" + name[layer.end() :] if layer and "nonlinearity" not in name else name
    if generic not in table:
        raise InputError(f"{name} is no parameter of a GPT-BERT")
    return table[generic].replace("L", layer[0]) if "L" in generic else table[generic]


def read_token_file(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a `.bin` of upstream: `torch.save` of a list of 1-D integer tensors, one a document.

    int16 files hold ids from 32768 up as negative numbers; they are read as what was meant. A leading `<s>` is dropped.

    Returns:
        Token ids [num_tokens] and document offsets [num_documents + 1] int64.

    Raises:
        InputError: the file is damaged, holds anything but integer tensors (code is never run).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch wonders aloud about pickles that are refused anyway
            documents = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"token file {path}: refused, since it holds more than tensors (maybe code); tokenize the corpus again"
        ) from error
    except Exception as error:  # a damaged pickle can raise anything
        reason = first_line(error)
        raise InputError(f"token file {path}: damaged or not a token file ({reason})") from error
    integers = (torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64)
    if not isinstance(documents, list) or not all(
        isinstance(document, Tensor)
        and document.layout is torch.strided
        and document.ndim == 1
        and document.dtype in integers
        for document in documents
    ):
        raise InputError(f"token file {path}: expected a list of 1-D integer tensors, as upstream saves it")
    arrays = [_unwrap(document.numpy(), path) for document in documents]
    arrays = [array[1:] if len(array) and array[0] == BOS_ID else array for array in arrays]
    offsets = np.cumsum([0] + [len(array) for array in arrays], dtype=np.int64)
    return np.concatenate(arrays) if arrays else np.empty(0, np.uint16), offsets


def _unwrap(ids: np.ndarray, path: str | Path) -> np.ndarray:
    if ids.dtype == np.int16:
        return ids.view(np.uint16)
    if ids.size and (ids.min() < 0 or ids.max() >= 2**32):
        raise InputError(
            f"token file {path}: holds token ids from {ids.min()} to {ids.max()}, expected 32 bits unsigned"
        )
    return ids.astype(np.uint32)
