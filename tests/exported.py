"""A checkpoint on disk in which every weight affects the output, as input of export and import."""

import json
from dataclasses import asdict
from pathlib import Path

import torch

from gptbert.checkpoint import manifest
from gptbert.checkpoint.weights import write_weights
from gptbert.config import ModelConfig
from gptbert.model import GPTBert
from gptbert.text.tokenizer import load_tokenizer
from tests.runs import assert_same, write_inputs

SHAPE = ModelConfig(
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=2,
    num_hidden_layers=3,
    vocab_size=324,  # more than the tokenizer has
    max_position_embeddings=23,  # fp32 rounds the logarithm of the farthest distance up
    position_bucket_size=8,
    attention_probs_dropout_prob=0.1,
    hidden_dropout_prob=0.1,
    layer_norm_eps=1e-5,
)


LENGTH = 40  # of texts, beyond max_position_embeddings
CLOSE = {"rtol": 1e-9, "atol": 1e-9}  # for logits in fp64: in fp32 what rounding comes to depends on the machine


def random_model(seed: int) -> GPTBert:
    """A model in eval mode; no weight keeps a value that hides bugs, such as biases of 0 or one-hot α."""
    torch.manual_seed(seed)
    model = GPTBert(SHAPE).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def write_checkpoint(folder: Path) -> tuple[Path, dict[str, GPTBert]]:
    """Write a checkpoint; returns its folder, and the models with its weights and its EMA."""
    inputs = folder / "inputs"
    inputs.mkdir()
    write_inputs(inputs, train_characters=20_000)
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    models = {"model": random_model(1), "ema": random_model(2)}
    for name, model in models.items():
        write_weights(checkpoint / f"{name}.safetensors", model.state_dict(), SHAPE)
    (checkpoint / "model_config.json").write_text(json.dumps(asdict(SHAPE)))
    (checkpoint / "train_config.json").write_text(json.dumps({"name": "a run", "seq_length": 16, "max_steps": 9}))
    (checkpoint / "tokenizer.json").write_bytes((inputs / "tokenizer.json").read_bytes())
    assert load_tokenizer(checkpoint / "tokenizer.json").get_vocab_size() < SHAPE.vocab_size
    manifest.write(checkpoint)
    return checkpoint, {name: model.double() for name, model in models.items()}


def assert_same_model(one: torch.nn.Module, other: torch.nn.Module, *inputs: torch.Tensor) -> None:
    """Two models of transformers have the same weights and compute the same, bit for bit.

    Loaded weights lie in memory where their file has them, and on some CPUs a product's order of additions depends on
    the address: outputs are compared after both models' weights were copied to where PyTorch puts tensors.
    """
    assert_same(one.state_dict(), other.state_dict())
    outputs = []
    for model in (one, other):
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
        outputs.append({name: value for name, value in model(*inputs).items() if "logits" in name})
    assert outputs[0]
    assert_same(*outputs)
