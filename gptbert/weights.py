"""A model's weights in a file, under the published names."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptbert.config import ModelConfig
from gptbert.errors import InputError, first_line
from gptbert.model import GPTBert
from gptbert.upstream import from_upstream, to_upstream


def write_weights(path: Path, weights: dict[str, Tensor], config: ModelConfig) -> None:
    """Write whole weights, named as in `GPTBert`."""
    published = to_upstream(weights, config)
    # one tensor under two names is stored twice: safetensors has no aliases
    save_file({key: tensor.clone() for key, tensor in published.items()}, path)


def read_weights(file: Path, config: ModelConfig) -> dict[str, Tensor]:
    """Weights, named as in `GPTBert`, on the CPU.

    Raises:
        InputError: the file's name, and that it is missing, damaged, or of a model of another shape.
    """
    try:
        if not file.is_file():  # a pipe or device may never end
            raise FileNotFoundError("no such file")
        weights = from_upstream(load_file(file))
    except (InputError, OSError, SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file.name}: {first_line(error)[:100]}") from error
    expected = shapes(config)
    found = {name: tensor.shape for name, tensor in weights.items()}
    if wrong := [name for name in expected | found if expected.get(name) != found.get(name)]:
        raise InputError(f"{file.name}: {wrong[0]} does not fit model_config.json")
    if odd := [name for name, tensor in weights.items() if not tensor.is_floating_point()]:
        raise InputError(f"{file.name}: {odd[0]} is of type {weights[odd[0]].dtype}")
    return weights


def shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Of a model's weights by name, from a model that takes no memory."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in GPTBert(config).state_dict().items()}
