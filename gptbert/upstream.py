"""Conversion to and from the parameter names of published GPT-BERTs, in any layout (docs/published.md)."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from gptbert.config import ModelConfig
from gptbert.errors import InputError, listed
from gptbert.model.embedding import position_bucket

# our name → published name; {} is the layer
_TO_PUBLISHED = {
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
_FROM_PUBLISHED = {published: ours for ours, published in _TO_PUBLISHED.items()}
_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")
TIED_WEIGHT = "classifier.nonlinearity.5.weight"
_EMBEDDING = "embedding.word_embedding.weight"
_BUFFER = "transformer.attention_layers.{}.position_indices"
_BUFFER_PATTERN = r"transformer\.attention_layers\.\d+\.position_indices"
# how names begin where the encoder is no module of its own, as in BabyLM's baselines of 2025; and upstream's beginning
_OTHER_LAYOUT = {
    "attention_layers.": "transformer.attention_layers.",
    "mlp_layers.": "transformer.mlp_layers.",
    "dwa_modules.": "transformer.dwa_modules.",
    "lm_head.": "classifier.",
}
_MOST_NAMED = 5  # in a message
# parts of names that wrappers of modules put in: DDP, compile, FSDP, activation checkpointing, DeepSpeed, Lightning
_WRAPPERS = {"module", "model", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}


def from_upstream(
    state_dict: Mapping[str, Tensor], config: ModelConfig | None = None, keys: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """Convert published parameter names to this model's, of any layout, whatever wrappers are in them.

    Buffers and the tied weight's copy are compared and dropped.

    Args:
        state_dict: a published model's; the tied weight under one of its names, or both.
        config: the model's shape, to check the buffers against; None drops them unchecked.
        keys: what messages call a weight, by its name in upstream's layout; None: as it is called here.

    Raises:
        InputError: names are not those of a GPT-BERT; or what the weights say twice differs, under names with and
            without a wrapper or of two layouts, in the tied weight or in a buffer.
    """
    unwrapped, first = _unwrapped(state_dict)
    keys = first if keys is None else {**first, **keys}
    tied = unwrapped.pop(TIED_WEIGHT, None)
    if tied is not None and not same(unwrapped.setdefault(_EMBEDDING, tied), tied):
        raise InputError(f"{keys[_EMBEDDING]} and {keys[TIED_WEIGHT]} differ, and a GPT-BERT has one weight for both")
    if unknown := [keys[name] for name in unwrapped if not is_published(name)]:
        others = f", nor are {listed(unknown[1:], _MOST_NAMED)}" if unknown[1:] else ""
        raise InputError(f"{unknown[0]} is no parameter of a GPT-BERT{others}")
    converted, buckets = {}, None
    for name, tensor in unwrapped.items():
        if re.fullmatch(_BUFFER_PATTERN, name):
            if config and buckets is None and tensor.shape == (config.max_position_embeddings,) * 2:
                buckets = position_buckets(config)
            # upstream's own rounding puts the farthest pair out of range in some shapes (`position_bucket`)
            if config and (
                buckets is None or not same(tensor.long().clamp(0, 2 * config.position_bucket_size - 2), buckets)
            ):
                raise InputError(
                    f"{keys[name]} differs from what position_bucket_size and max_position_embeddings make of it"
                )
        elif alpha := re.fullmatch(r"transformer\.dwa_modules\.alphas\.(\d+)", name):
            layer, is_feed_forward = divmod(int(alpha[1]), 2)
            mix = "feed_forward_mix" if is_feed_forward else "attention_mix"
            converted[f"blocks.{layer}.{mix}.alpha"] = tensor
        else:
            converted[_rename(name, _FROM_PUBLISHED)] = tensor
    return converted


def _unwrapped(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by their name in upstream's layout without the parts that wrappers put in, and each one's first key.

    Raises:
        InputError: two names become the same, and their tensors differ.
    """
    unwrapped: dict[str, Tensor] = {}
    first: dict[str, str] = {}
    for wrapped, tensor in state_dict.items():
        name = upstream_name(unwrapped_name(wrapped))
        if not same(unwrapped.setdefault(name, tensor), tensor):
            raise InputError(f"{first[name]} and {wrapped} are the same weight, and differ")
        first.setdefault(name, wrapped)
    return unwrapped, first


def upstream_name(name: str) -> str:
    """A name of any published layout, without wrappers, in upstream's; other names as they are."""
    for beginning, upstreams in _OTHER_LAYOUT.items():
        if name.startswith(beginning):
            return upstreams + name.removeprefix(beginning)
    return name


def unwrapped_name(name: str) -> str:
    """A name without the parts that wrappers put in."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same shape and values, NaN being equal to NaN."""
    if one is other:
        return True
    return one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all())  # noqa: PLR0124


def is_published(name: str) -> bool:
    """Whether a name without wrappers is one of a published model's."""
    others = (r"transformer\.dwa_modules\.alphas\.\d+", re.escape(TIED_WEIGHT), _BUFFER_PATTERN)
    return _generic(name) in _FROM_PUBLISHED or any(re.fullmatch(other, name) for other in others)


def to_published(name: str) -> str | None:
    """The published name of one of this model's parameters; None if it is none."""
    if alpha := re.fullmatch(r"blocks\.(\d+)\.(attention|feed_forward)_mix\.alpha", name):
        return f"transformer.dwa_modules.alphas.{2 * int(alpha[1]) + (alpha[2] == 'feed_forward')}"
    return _rename(name, _TO_PUBLISHED) if _generic(name) in _TO_PUBLISHED else None


def position_buckets(config: ModelConfig) -> Tensor:
    """The published models' buffer [M, M] int32: each pair of positions' bucket."""
    longest = config.max_position_embeddings
    distance = torch.arange(longest - 1, -longest, -1)  # [2M − 1]
    buckets = (position_bucket(distance, config) + config.position_bucket_size - 1).int()
    return buckets.unfold(0, longest, 1).flip(0)  # [M, M] of few bytes, then of all: i − j of row i and column j


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
        published = to_published(name)
        if published is None:
            raise InputError(f"{name} is no parameter of a GPT-BERT")
        converted[published] = tensor
    converted[TIED_WEIGHT] = converted[_EMBEDDING]
    if config is not None:
        buckets = position_buckets(config)
        for layer in range(config.num_hidden_layers):
            converted[_BUFFER.format(layer)] = buckets
    return converted


def _rename(name: str, table: dict[str, str]) -> str:
    generic = _generic(name)
    if generic not in table:
        raise InputError(f"{name} is no parameter of a GPT-BERT")
    return table[generic].format(*_LAYER.findall(name)[:1])


def _generic(name: str) -> str:
    """A name with `{}` for its layer."""
    name = name.replace("{}", "")  # which is no layer
    return name if "nonlinearity" in name else _LAYER.sub("{}", name, count=1)
