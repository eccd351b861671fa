"""A model's weights in a file, under the published names."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptbert.config import ModelConfig
from gptbert.errors import InputError, first_line, listed
from gptbert.model import GPTBert
from gptbert.upstream import from_upstream, to_published, to_upstream


def write_weights(path: Path, weights: dict[str, Tensor], config: ModelConfig) -> None:
    """Write full weights, named as in `GPTBert`."""
    published = to_upstream(weights, config)
    # copies: safetensors refuses aliases, so a tensor under two names is stored twice; none of them on a full GPU
    save_file({key: tensor.to("cpu", copy=True) for key, tensor in published.items()}, path)


def read_weights(file: Path, config: ModelConfig) -> dict[str, Tensor]:
    """Weights, named as in `GPTBert`, on the CPU.

    Raises:
        InputError: the file is missing, damaged, or of a model of a different shape; names the file.
    """
    try:
        if not file.is_file():  # reading a pipe or device may never end
            raise FileNotFoundError("no such file")
        return fitting(load_file(file), config)
    except (InputError, OSError, SafetensorError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file.name}: {first_line(error)[:200]}") from error


def fitting(
    published: dict[str, Tensor], config: ModelConfig, keys: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """Convert weights under published names to those of a `GPTBert` of this shape.

    Args:
        published: of any published layout.
        config: the shape.
        keys: what the file that they are from calls them, by their name in upstream's layout, for messages.

    Raises:
        InputError: a weight is missing, unknown, of a different shape, quantized, not finite, 0 everywhere, or given
            twice with different values; names the weight.
    """
    weights, expected = from_upstream(published, config, keys), shapes(config)
    if missing := [name for name in expected if name not in weights]:
        others = f", and so are {listed(missing[1:], 4)}" if missing[1:] else ""
        is_head = set(missing) == {name for name in expected if name.startswith("head.")}
        way_on = "; it was saved for another task, without its language model's head" if is_head else ""
        raise InputError(f"{missing[0]} is missing{others} (in files: {to_published(missing[0])}){way_on}")
    for name in expected | weights:
        published_name = to_published(name) or name
        key = (keys or {}).get(published_name, published_name)
        in_file = f", {key} in the file" if key != published_name else ""
        if name not in expected:
            raise InputError(f"{name} is not a weight of a model of this shape{in_file}")
        if weights[name].shape != expected[name]:
            shape = f"{list(weights[name].shape)} for {list(expected[name])}"
            raise InputError(f"{name} does not fit the model: {shape}{in_file}")
        if not weights[name].is_floating_point() or weights[name].itemsize < 2:  # their scales are elsewhere
            kind = str(weights[name].dtype).removeprefix("torch.")
            raise InputError(f"{name} is of type {kind}, expected floats of 16 bits or more{in_file}")
        if weights[name].ndim > 1 and not weights[name].any():
            raise InputError(f"{name} is 0 everywhere, as in a file that was not written to its end{in_file}")
        if not weights[name].float().isfinite().all():
            raise InputError(f"{name} has values that are NaN or infinite in fp32{in_file}")
    return weights


def shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Shapes of a model's weights by name, from a model on the meta device."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in GPTBert(config).state_dict().items()}
