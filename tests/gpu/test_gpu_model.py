"""The model on the device against the CPU, and compiled against eager, forward and backward."""

import dataclasses

import pytest
import torch

from gptbert.config import ModelConfig
from gptbert.model import GPTBert
from gptbert.model.batch import Batch
from gptbert.model.block import BLOCK_SEEDS
from gptbert.model.compilation import compile_blocks
from gptbert.model.dropout import random_seeds
from kernels import IGNORE_INDEX
from tests.numerics import assert_near, relative_error

CPU = torch.device("cpu")
SHAPE = ModelConfig(
    hidden_size=128,
    intermediate_size=192,
    num_attention_heads=4,
    num_hidden_layers=2,
    vocab_size=1001,
    max_position_embeddings=64,
    position_bucket_size=16,
    attention_probs_dropout_prob=0.1,
    hidden_dropout_prob=0.1,
    layer_norm_eps=1e-5,
)
TOY = dataclasses.replace(SHAPE, hidden_size=16, intermediate_size=24, num_attention_heads=2, vocab_size=65)


@pytest.fixture
def shape(sized):
    return sized(SHAPE, TOY)


def make_model(shape, device, dtype=torch.float32):
    """A model with randomized weights, and the same dropout seeds on every device."""
    torch.manual_seed(5)
    model = GPTBert(shape)
    for param in model.parameters():
        param.data += 0.05 * torch.randn_like(param)
    seeds = random_seeds(BLOCK_SEEDS * shape.num_hidden_layers + 2, CPU).to(device)
    model.dropout_seeds = lambda _: seeds
    return model.to(device, dtype)


def run(model, shape, rows, device, *, length=24, autocast=False):
    """Loss and gradients of rows of both objectives, with several documents and padding."""
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(16, shape.vocab_size, (rows, length), generator=generator)
    documents = (torch.arange(length) >= length // 2).long().repeat(rows, 1)
    documents[-1, -3:] = -1
    labels = torch.where(torch.rand(rows, length, generator=generator) < 0.3, ids, IGNORE_INDEX)
    model.zero_grad()
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        tensors = [tensor.to(device) for tensor in (ids, documents, labels)]
        batch = Batch(*tensors, num_masked=rows // 2, most_labels=rows * length // 2)
        result = model(batch, torch.tensor([2.0, 0.5], device=device), 1e-4)
    result.total.backward()
    return [result.loss.detach(), *(param.grad for param in model.parameters())]


def assert_all_near(model, actual, exact, plain, dtype):
    names = ["loss", *(name for name, _ in model.named_parameters())]
    for name, *tensors in zip(names, actual, exact, plain, strict=True):
        assert_near(*tensors, dtype, name=name)


def test_the_device_computes_what_the_cpu_does(shape, device):
    model = make_model(shape, device)
    exact = run(make_model(shape, CPU, torch.float64), shape, 5, CPU)
    plain = run(make_model(shape, CPU), shape, 5, CPU)
    assert_all_near(model, run(model, shape, 5, device), exact, plain, torch.float32)


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_is_eager_for_any_number_of_rows(shape, device, autocast, compiler):
    """Compiled error against fp64 on the CPU is bounded by eager's error: the two round at different places."""
    model = make_model(shape, device)
    numbers = (5, 2, 1, 8)
    eager = {rows: run(model, shape, rows, device, autocast=autocast) for rows in numbers}
    compile_blocks(model.blocks, mixed_precision=autocast)
    for rows in numbers:
        with torch._dynamo.config.patch(error_on_recompile=rows != numbers[0]):
            compiled = run(model, shape, rows, device, autocast=autocast)
            again = run(model, shape, rows, device, autocast=autocast)
        assert all(torch.equal(*pair) for pair in zip(compiled, again, strict=True))
        exact = run(make_model(shape, CPU, torch.float64), shape, rows, CPU)
        assert_all_near(model, compiled, exact, eager[rows], torch.bfloat16 if autocast else torch.float32)


@torch.no_grad()
def test_compiled_evaluation_is_eager(shape, device, compiler):
    model = make_model(shape, device).eval()
    model.dropout_seeds = lambda _: None
    ids = torch.randint(16, shape.vocab_size, (3, 24), generator=torch.Generator().manual_seed(1)).to(device)
    states = [model.encode(ids, torch.zeros_like(ids), causal=True)]
    compile_blocks(model.blocks)
    states.append(model.encode(ids, torch.zeros_like(ids), causal=True))
    assert relative_error(states[1], states[0]) < 1e-5
