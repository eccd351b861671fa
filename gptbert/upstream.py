"""What upstream GPT-BERT left on people's disks: parameter names of checkpoints, and token files."""

import re
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptbert.config import ModelConfig
from gptbert.errors import InputError
from gptbert.model import position_bucket
from gptbert.tokenizer import BOS_ID
from gptbert.torch_file import SavedTensor, Storage, TorchFile

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
TIED_WEIGHT = "classifier.nonlinearity.5.weight"
_BUFFER = "transformer.attention_layers.{}.position_indices"

# type of a .bin's tensors → the one of the ids that are read from it
_TOKEN_TYPES = {
    torch.uint8: np.uint8, torch.int8: np.uint8, torch.int16: np.uint16, torch.uint16: np.uint16,
    torch.int32: np.uint32, torch.uint32: np.uint32, torch.int64: np.uint32,
}  # fmt: skip
_EXPECTED = "expected a list of 1-D integer tensors, as upstream saves it"


def from_upstream(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published parameter names to this model's; buffers and the copy of the tied weight are dropped.

    Raises:
        InputError: a name belongs to no part of a GPT-BERT.
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


def read_token_file(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a `.bin` of upstream: `torch.save` of a list of 1-D integer tensors, one a document.

    int16 files hold ids from 32768 up as negative numbers; they are read as what was meant. A leading `<s>` is dropped.

    Returns:
        Token ids [num_tokens] and document offsets [num_documents + 1] int64.

    Raises:
        InputError: the file is damaged, holds anything but integer tensors (code is never run).
    """
    try:
        with TorchFile(path) as file:
            documents = _Documents()
            tokens, offsets = documents.read(file, file.value(build=documents.add))
    except InputError as error:
        raise InputError(f"token file {path}: {error}; tokenize the corpus again") from error
    starts = offsets[:-1][np.diff(offsets) > 0]
    led = starts[tokens[starts] == BOS_ID]  # positions of the `<s>` that documents begin with
    return np.delete(tokens, led) if len(led) else tokens, offsets - np.searchsorted(led, offsets)


class _Documents:
    """Where a file's tensors lie, as numbers: as objects, short documents would take several times the file."""

    def __init__(self) -> None:
        self._storages: list[Storage] = []
        self._places = array("q")  # storage, offset, length and stride of each tensor
        self._dtype: torch.dtype | None = None

    def add(self, saved: SavedTensor) -> int:
        """Note a tensor, and give the number that stands for it."""
        if len(saved.shape) != 1 or saved.dtype not in _TOKEN_TYPES:
            raise InputError(_EXPECTED)
        if self._dtype not in {None, saved.dtype}:
            raise InputError("expected documents of one integer type, as upstream saves them")
        self._dtype = saved.dtype
        if not self._storages or saved.storage != self._storages[-1]:
            self._storages.append(saved.storage)
        self._places.extend((len(self._storages) - 1, saved.offset, saved.shape[0], max(1, saved.stride[0])))
        return len(self._places) // 4 - 1

    def read(self, file: TorchFile, numbers: Any) -> tuple[np.ndarray, np.ndarray]:
        """The tensors with these numbers end to end, and their offsets; one storage in memory at a time."""
        count = len(self._places) // 4
        if type(numbers) is not list or not all(type(number) is int and 0 <= number < count for number in numbers):
            raise InputError(_EXPECTED)
        if not numbers:
            return np.empty(0, np.uint16), np.zeros(1, np.int64)
        places = np.frombuffer(self._places, np.int64).reshape(-1, 4)[numbers]
        if places[:, 2].sum(dtype=float) * self._dtype.itemsize > file.size:
            raise InputError("its documents overlap")
        offsets = np.concatenate([[0], np.cumsum(places[:, 2])])
        tokens = np.empty(offsets[-1], _TOKEN_TYPES[self._dtype])
        names = [self._storages[index].key for index in places[:, 0]]
        storage = ids = None
        for index in sorted(range(len(names)), key=names.__getitem__):  # what shares a storage is read together
            place, first, length, stride = places[index].tolist()
            if ids is None or self._storages[place].key != storage.key:
                storage = self._storages[place]
                ids = _unwrap(file.tensor(storage).view(self._dtype).numpy())
            elif self._storages[place] != storage:
                raise InputError("a storage is described in two ways")
            tokens[offsets[index] : offsets[index + 1]] = ids[first::stride][:length]
        return tokens, offsets


def _unwrap(ids: np.ndarray) -> np.ndarray:
    """Ids as they were meant, of an unsigned type."""
    if ids.dtype == np.int16:
        return ids.view(np.uint16)
    if ids.size and (ids.min() < 0 or ids.max() >= 2**32):
        raise InputError(f"holds token ids from {ids.min()} to {ids.max()}, expected 32 bits unsigned")
    return ids
