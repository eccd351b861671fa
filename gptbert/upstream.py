"""Conversion to and from the parameter names of upstream GPT-BERT's checkpoints."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from gptbert.config import ModelConfig
from gptbert.errors import InputError
from gptbert.model.gptbert import position_bucket

# our name → published name; {} is the layer
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
TIED_WEIGHT = "classifier.nonlinearity.5.weight"
_BUFFER = "transformer.attention_layers.{}.position_indices"


def from_upstream(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert published parameter names to this model's; buffers and the tied weight's copy are dropped.

    Raises:
        InputError: a name is not one of a GPT-BERT's.
    """
    converted = {}
    for name, tensor in state_dict.items():
        name = name.removeprefix("module.").removeprefix("_orig_mod.")  # noqa: PLW2901  DDP's and compile's prefixes
        if name == TIED_WEIGHT or name.endswith(".position_indices"):
            continue
        if alpha := re.fullmatch(r"transformer\.dwa_modules\.alphas\.(\d+)", name):
            layer, is_feed_forward = divmod(int(alpha[1]), 2)
            mix = "feed_forward_mix" if is_feed_forward else "attention_mix"
            converted[f"blocks.{layer}.{mix}.alpha"] = tensor
        else:
            converted[_rename(name, _FROM_PUBLISHED)] = tensor
    return converted


def to_upstream(state_dict: Mapping[str, Tensor], config: ModelConfig | None = None) -> dict[str, Tensor]:
    """Convert this model's parameter names to the published ones, with the tied weight under both of its names.

    Args:
        state_dict: a `GPTBert`'s.
        config: adds each layer's buffer of position buckets [M, M] int32, which upstream's strict loading expects.

    Raises:
        InputError: a name is not one of a GPT-BERT's.
    """
    converted = {}
    for name, tensor in state_dict.items():
        if alpha := re.fullmatch(r"blocks\.(\d+)\.(attention|feed_forward)_mix\.alpha", name):
            converted[f"transformer.dwa_modules.alphas.{2 * int(alpha[1]) + (alpha[2] == 'feed_forward')}"] = tensor
        else:
            converted[_rename(name, _TO_PUBLISHED)] = tensor
    converted[TIED_WEIGHT] = converted["embedding.word_embedding.weight"]
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
