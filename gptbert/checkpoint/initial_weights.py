"""Weights to start a run from instead of random ones (`--initial_weights`)."""

import hashlib

import torch
from torch import Tensor

from gptbert.checkpoint.folder import differences, newest_in
from gptbert.checkpoint.saved_model import read_full_weights
from gptbert.config import ModelConfig, TrainConfig
from gptbert.errors import InputError, prefix_errors
from gptbert.io.names import MODEL_CONFIG, TOKENIZER
from gptbert.text.tokenizer import are_same


def read_initial_weights(config: TrainConfig, model_config: ModelConfig) -> dict[str, Tensor] | None:
    """The weights named by `--initial_weights`, on the CPU, or None without the flag.

    Raises:
        InputError: they are missing or damaged, or their model has a different shape or tokenizer.
    """
    if config.initial_weights is None:
        return None
    with prefix_errors("--initial_weights"):
        path = newest_in(config.initial_weights)
        saved_config = ModelConfig.from_json(path / MODEL_CONFIG)
        if changes := differences(saved_config, model_config):
            raise InputError(f"{path}: its model differs from --config_file: {changes}")
        if not are_same(path / TOKENIZER, config.tokenizer_path):  # an exported one is normalized
            raise InputError(f"{path}: its tokenizer.json is not --tokenizer_path {config.tokenizer_path}")
        return read_full_weights(path, "model", model_config)


def digest_of_weights(weights: dict[str, Tensor]) -> str:
    """Recognizes weights, by sums of their bytes: reading them takes longer."""
    sums = [(name, int(tensor.contiguous().view(torch.uint8).sum())) for name, tensor in sorted(weights.items())]
    return hashlib.sha256(repr(sums).encode()).hexdigest()
