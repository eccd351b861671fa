"""Compiled blocks equal eager ones, and nothing recompiles after a run's first steps."""

import pytest
import torch
from torch._dynamo.utils import counters

from gptbert.command_line import parse
from gptbert.config import TrainConfig
from gptbert.data.hybrid_plan import HybridPlan
from gptbert.data.inputs import Inputs
from gptbert.distributed.world import World
from gptbert.errors import InputError
from gptbert.model import GPTBert
from gptbert.model.compilation import compile_blocks
from gptbert.monitoring.samples import Samples
from gptbert.schedules import batch_size, length_factor
from gptbert.trainer import Trainer
from gptbert.training import compile_choice
from gptbert.training.step import autocast
from kernels import IGNORE_INDEX
from tests.conftest import TINY
from tests.gpu.tracing import trace_only
from tests.lanes import ALL_CODE
from tests.numerics import assert_accurate
from tests.runs import flags, write_inputs

CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("fresh_compiler")


def make_model(**changes):
    torch.manual_seed(5)
    settings = {**vars(TINY), "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, **changes}
    model = GPTBert(type(TINY)(**settings))
    for param in model.parameters():
        param.data += 0.05 * torch.randn_like(param)
    return model


def make_batch(rows, length):
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(16, 64, (rows, length), generator=generator)
    documents = (torch.arange(length) >= length // 2).long().expand(rows, -1)
    labels = torch.where(torch.rand(rows, length, generator=generator) < 0.3, ids, IGNORE_INDEX)
    return ids, documents, labels


def run(model, rows, *, causal, dtype=None, length=16):
    """Loss and gradients; each call uses the same dropout seeds."""
    model.zero_grad()
    torch.manual_seed(9)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        result = model.sums(*make_batch(rows, length), causal)
    result.total.backward()
    return [result.loss.detach(), *(param.grad for param in model.parameters())]


def assert_close(compiled, eager):
    """Loss and each gradient as a whole: single elements depend on the order of additions, which a compiler chooses."""
    for actual, expected in zip(compiled, eager, strict=True):
        assert (actual - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_is_eager_forward_and_gradients_with_dropout(dtype, monkeypatch):
    """In bf16 by the numerics rule, as the two round at different places, and without ALL_CODE up to Inductor."""
    if dtype == torch.bfloat16 and not ALL_CODE:
        trace_only(monkeypatch, backend="aot_eager_decomp_partition")
    model = make_model()
    exact = run(make_model().double(), 3, causal=False)
    eager = run(model, 3, causal=False, dtype=dtype)
    compile_blocks(model.blocks)
    compiled = run(model, 3, causal=False, dtype=dtype)
    assert counters["stats"]["unique_graphs"] == 2
    names = ["loss", *(name for name, _ in model.named_parameters())]
    for name, *tensors in zip(names, compiled, exact, eager, strict=True):
        if dtype == torch.float32:
            assert_accurate(*tensors, name=name)
        else:
            actual, expected, plain = tensors
            bound = 3 * (plain - expected).abs().max() + 0.02 * expected.abs().max()
            assert (actual - expected).abs().max() < bound, name


def test_compiling_keeps_the_names_of_parameters():
    model = make_model()
    names = list(model.state_dict())
    compile_blocks(model.blocks)
    assert list(model.state_dict()) == names


def test_rows_and_objectives_do_not_recompile():
    model, eager = make_model(), make_model()
    compile_blocks(model.blocks)
    run(model, 3, causal=False)
    graphs = counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows, causal in ((5, True), (2, False), (1, True), (1, False), (8, True)):
            compiled = run(model, rows, causal=causal)
            assert_close(compiled, run(eager, rows, causal=causal))
    assert counters["stats"]["unique_graphs"] == graphs == 2
    assert not counters["graph_break"]


def test_without_unbacked_sizes_one_row_has_code_of_its_own(monkeypatch):
    trace_only(monkeypatch, backend="eager")
    monkeypatch.delattr("torch._dynamo.decorators.mark_unbacked")
    model, eager = make_model(), make_model()
    compile_blocks(model.blocks)
    for rows in (3, 5, 1, 2, 8):
        assert_close(run(model, rows, causal=True), run(eager, rows, causal=True))
    assert counters["stats"]["unique_graphs"] == 4


@pytest.fixture
def even_short_runs(monkeypatch):
    monkeypatch.setitem(compile_choice.COMPILE_SECONDS, "cpu", 0)


def test_a_whole_run_compiles_its_shapes_once(tmp_path, even_short_runs, monkeypatch):
    """Batch size, mask fraction and row length change, objectives alternate, and validation runs in between."""
    trace_only(monkeypatch, backend="eager")
    inputs = write_inputs(tmp_path)
    settings = {"mixed_precision": True, "seq_length_growth": True, "seq_length": 8}
    config = parse(TrainConfig, flags(inputs, **settings, max_steps=40, hybrid_denominator=2, hybrid_mode="batch"))
    assert config.compile
    trainer = Trainer(config, Inputs.open(config), HybridPlan(config, 1), World(0, 1, CPU))
    samples = Samples(config, trainer.inputs.valid_store, trainer.world)
    graphs, shapes = [counters["stats"]["unique_graphs"]], []
    for step in range(config.max_steps):
        trainer.train_step(trainer.loader.load(step))
        if step in {0, 30, 37}:
            trainer.validation_record()
            assert samples(trainer.model, autocast(trainer.config, trainer.world.device))
        graphs.append(counters["stats"]["unique_graphs"])
        shapes.append((batch_size(config, step), length_factor(config, step)))
    assert len({rows for rows, _ in shapes}) > 4
    assert {factor for _, factor in shapes} == {1, 2, 4}
    assert set(graphs) == {2 * 3 + 4}, "all before the first step: two for each length, four for evaluation"
    assert not counters["graph_break"]


@pytest.mark.parametrize("compiled", [False, True])
def test_short_runs_are_not_compiled(tmp_path, compiled, monkeypatch):
    inputs = write_inputs(tmp_path)
    config = parse(TrainConfig, flags(inputs))
    plan = HybridPlan(config, 1)
    trace_only(monkeypatch, backend="eager")
    if compiled:
        monkeypatch.setattr(plan, "tokens_before", lambda step: 10**12)
    trainer = Trainer(config, Inputs.open(config), plan, World(0, 1, CPU))
    assert trainer.is_compiled is compiled
    assert (counters["stats"]["unique_graphs"] > 0) is compiled


def test_with_no_compile_nothing_is_compiled(tmp_path, even_short_runs):
    inputs = write_inputs(tmp_path)
    config = parse(TrainConfig, flags(inputs, no_compile=True))
    assert not Trainer(config, Inputs.open(config), HybridPlan(config, 1), World(0, 1, CPU)).is_compiled


def test_without_a_compiler_there_is_one_line(tmp_path, even_short_runs):
    inputs = write_inputs(tmp_path)
    config = parse(TrainConfig, flags(inputs))
    without = {"cpp.cxx": ("/nowhere/g++",), "force_disable_caches": True}
    message = r"^--compile: .*--no_compile trains without$"
    with torch._inductor.config.patch(without), pytest.raises(InputError, match=message):
        Trainer(config, Inputs.open(config), HybridPlan(config, 1), World(0, 1, CPU))
