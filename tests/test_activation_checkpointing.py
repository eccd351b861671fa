"""Activation checkpointing: bitwise equal gradients from fewer saved activations."""

import pytest
import torch
from torch._dynamo.utils import counters

from gptbert.command_line import parse
from gptbert.config import TrainConfig
from gptbert.data.hybrid_plan import HybridPlan
from gptbert.data.inputs import Inputs
from gptbert.distributed.world import World
from gptbert.model import GPTBert
from gptbert.model.compilation import compile_blocks
from gptbert.trainer import Trainer
from tests.conftest import TINY
from tests.gpu.tracing import trace_only
from tests.runs import flags, write_inputs

DROPOUT = {**vars(TINY), "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


pytestmark = pytest.mark.usefixtures("fresh_compiler")


def make_model():
    torch.manual_seed(5)
    model = GPTBert(type(TINY)(**DROPOUT))
    for param in model.parameters():
        param.data += 0.05 * torch.randn_like(param)
    return model


def set_checkpointing(model, value):
    for block in model.blocks:
        block.is_checkpointed = value


def forward(model, rows=8, length=32, *, causal=False, dtype=torch.float32):
    """The loss; each call uses the same batch and dropout seeds."""
    torch.manual_seed(9)
    ids = torch.randint(16, 64, (rows, length))
    documents = (torch.arange(length) >= length // 2).long().expand(rows, -1)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        return model.sums(ids, documents, ids, causal).total


def gradients(model, *args, **settings):
    """Loss and gradients."""
    loss = forward(model, *args, **settings)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.parametrize("causal", [False, True])
@DTYPES
def test_gradients_are_the_same_to_the_bit(dtype, causal):
    model = make_model()
    plain = gradients(model, causal=causal, dtype=dtype)
    without_dropout = gradients(model.eval(), causal=causal, dtype=dtype)
    assert not torch.equal(plain[0], without_dropout[0])
    set_checkpointing(model.train(), True)
    assert all(map(torch.equal, plain, gradients(model, causal=causal, dtype=dtype)))


def kept_bytes(model, **settings):
    """Bytes that a forward saves for the backward: each storage counted once, without the weights."""
    weights = {param.untyped_storage().data_ptr() for param in model.parameters()}
    kept = {}

    def pack(tensor):
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in weights:
            kept[memory.data_ptr()] = memory.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward(model, **settings)
    del loss  # kept until here so that no address is reused
    return sum(kept.values())


@DTYPES
def test_less_is_kept_for_the_backward(dtype):
    model = make_model()
    plain = kept_bytes(model, dtype=dtype)
    set_checkpointing(model, True)
    assert kept_bytes(model, dtype=dtype) < 0.4 * plain


@DTYPES
def test_compiled_it_is_the_same_keeps_less_and_needs_no_code_of_its_own(dtype, monkeypatch):
    """Up to Inductor, whose code takes a minute to compile: the choice of what is kept comes before it."""
    trace_only(monkeypatch, backend="aot_eager_decomp_partition")
    model, length = make_model(), 16
    compile_blocks(model.blocks)
    plain = gradients(model, length=length, dtype=dtype)
    with torch._dynamo.config.patch(error_on_recompile=True):
        kept = kept_bytes(model, length=length, dtype=dtype)
        set_checkpointing(model, True)
        assert all(map(torch.equal, plain, gradients(model, length=length, dtype=dtype)))
        assert kept_bytes(model, length=length, dtype=dtype) < 0.5 * kept
        for rows, causal in ((5, True), (1, False), (8, True)):
            gradients(model, rows, length, causal=causal, dtype=dtype)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]


@pytest.mark.parametrize("given", [False, True])
def test_the_flag_reaches_every_block(tmp_path, given):
    inputs = write_inputs(tmp_path)
    config = parse(TrainConfig, flags(inputs, activation_checkpointing=given))
    trainer = Trainer(config, Inputs.open(config), HybridPlan(config, 1), World(0, 1, torch.device("cpu")))
    assert {block.is_checkpointed for block in trainer.model.blocks} == {given}
