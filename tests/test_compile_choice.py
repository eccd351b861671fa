"""The choice to compile a run: savings against cost, kept on resuming, and printed at startup."""

import dataclasses

import pytest
import torch
import torch._functorch.config

from gptbert import trainer
from gptbert.checkpoint import manifest
from gptbert.checkpoint.checkpoint import load
from gptbert.checkpoint.folder import list_checkpoints
from gptbert.command_line import parse
from gptbert.config import ModelConfig, TrainConfig
from gptbert.data.hybrid_plan import HybridPlan
from gptbert.distributed.world import World
from gptbert.model.block import Block
from gptbert.model.compilation import compile_blocks
from gptbert.train import fit
from gptbert.training import compile_choice
from gptbert.training.compile_choice import choose, seconds_saved
from kernels import wanted
from tests.runs import MODEL, flags, write_inputs

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SMALL = ModelConfig.from_json("configs/small.json")
ANCIENT_GREEK = ModelConfig(  # the shape of a real run that was once left uncompiled
    **{**MODEL, "hidden_size": 256, "intermediate_size": 640, "num_attention_heads": 4, "num_hidden_layers": 6}
    | {"vocab_size": 32768, "position_bucket_size": 32, "max_position_embeddings": 512}
)
RUN = {"seq_length": 128, "local_batch_size": 32, "global_batch_size": 64, "batch_reduction": 1}
DEMO = {"max_steps": 500, "global_batch_size": 32, "hybrid_numerator": 1, "hybrid_denominator": 2}  # of `make demo`


@pytest.fixture(scope="module")
def chosen(make_config):
    def choose_for(model, device, world_size, **settings):
        config = make_config(**RUN | settings)
        plan = HybridPlan(config, world_size)
        return choose(config, model, plan, World(0, world_size, device))

    return choose_for


@pytest.mark.parametrize(
    ("model", "device", "world_size", "settings", "compiled"),
    [
        (ANCIENT_GREEK, CPU, 2, {"max_steps": 700, "global_batch_size": 64}, True),
        (ANCIENT_GREEK, CPU, 2, {"max_steps": 10}, False),
        (ModelConfig(**MODEL), CPU, 1, {"max_steps": 100}, False),
        (ModelConfig(**MODEL), CPU, 1, {"max_steps": 1000}, True),
        (SMALL, CPU, 1, {"max_steps": 3}, False),
        (SMALL, CPU, 1, {"max_steps": 100}, True),
        (SMALL, CPU, 1, {"max_steps": 100, "compile": False}, False),
        (SMALL, GPU, 1, {"max_steps": 100}, False),
        (SMALL, GPU, 1, {"max_steps": 2000}, True),
        (SMALL, GPU, 1, {"max_steps": 2000, "cuda_graph": "off", "seq_length_growth": True}, True),
        (SMALL, GPU, 1, {"max_steps": 2000, "seq_length_growth": True}, False),  # three row lengths to compile
        (SMALL, GPU, 1, {"max_steps": 1000, "cuda_graph": "off", "seq_length_growth": True}, False),
        (ModelConfig(**MODEL), GPU, 1, {"max_steps": 20}, False),
        (ModelConfig.from_json("configs/tiny.json"), CPU, 2, DEMO, True),
    ],
)
def test_a_run_is_compiled_where_it_gains_by_it(chosen, model, device, world_size, settings, compiled):
    assert chosen(model, device, world_size, **settings).is_compiled is compiled


@pytest.mark.parametrize(
    ("model", "settings", "compiled"),
    [
        (SMALL, {}, False),
        (SMALL, {"cuda_graph": "off", "seq_length_growth": True}, False),
        (SMALL, {"parallel": "fsdp", "cuda_graph": "off"}, True),  # sharded, the mixes are not fused
        (SMALL, {"mixed_precision": False}, True),  # nor is attention in fp32
        (dataclasses.replace(SMALL, num_attention_heads=8), {}, True),  # nor with heads of 48
        (dataclasses.replace(SMALL, intermediate_size=8200), {}, True),  # nor the wider gated norm
    ],
)
def test_a_run_is_not_compiled_where_all_is_fused(chosen, model, settings, compiled):
    """Fused kernels leave nothing between matrix products, and a launch less is what compiling is for."""
    wanted.use_fused(wanted.FUSED)
    choice = chosen(model, GPU, 2, **{"max_steps": 4000, "mixed_precision": True} | settings)
    assert choice.is_compiled is compiled
    assert ("leave nothing to compile" in choice.reason) is not compiled


def test_a_run_of_four_hundred_trillion_flops_saves_minutes(make_config):
    config = make_config(**RUN, max_steps=700)
    plan, world = HybridPlan(config, 2), World(1, 2, CPU)
    flops = compile_choice._flops(ANCIENT_GREEK, config, plan, 2)
    assert 1e14 < flops < 1e15
    assert 600 < seconds_saved(config, ANCIENT_GREEK, plan, world) < 4000


def test_all_ranks_decide_alike(make_config):
    config = make_config(**RUN, max_steps=700)
    choices = {choose(config, SMALL, HybridPlan(config, 4), World(rank, 4, CPU)) for rank in range(4)}
    assert len(choices) == 1


def test_the_reason_is_in_figures(chosen):
    assert str(chosen(SMALL, CPU, 1, max_steps=3, compile=False)) == "not compiled: --no_compile"
    line = str(chosen(SMALL, CPU, 1, max_steps=3))
    assert line.startswith("not compiled: compiling saves some 28 seconds of the run and takes 30 seconds, ")
    assert str(chosen(ANCIENT_GREEK, CPU, 2, max_steps=70000)).startswith("compiled: compiling saves some ")


@pytest.mark.parametrize(
    ("stored", "steps", "asked", "now", "compiled"),
    [
        (True, 3, True, True, True),  # shorter now
        (False, 100_000, True, True, False),  # longer now
        (None, 3, True, True, False),  # an earlier version's checkpoint, by its rule
        (None, 100_000, True, True, True),
        (None, 400, True, True, False),
        (False, 100_000, False, True, True),  # --no_compile was removed
        (True, 100_000, True, False, False),  # --no_compile was added
    ],
)
def test_a_resumed_run_goes_on_as_it_began(make_config, stored, steps, asked, now, compiled):
    config = make_config(**RUN, max_steps=steps, compile=now)
    resumed = dataclasses.make_dataclass("Resumed", ["is_compiled"])(stored)
    choice = choose(config, SMALL, HybridPlan(config, 1), World(0, 1, CPU), resumed, asked)
    assert choice.is_compiled is compiled
    assert ("goes on from" in choice.reason) == (asked and now)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def taken(monkeypatch):
    """Calls of compile_blocks: whether each Trainer compiles, without running the compiler."""
    decided = []
    monkeypatch.setattr(trainer, "compile_blocks", lambda blocks, **_: decided.append(blocks))
    monkeypatch.setattr("gptbert.train.prepare_cpp_kernels", lambda *_, **__: "torch")
    return decided


def run(inputs, **changes):
    fit(parse(TrainConfig, flags(inputs, validation_steps=1, **changes)))


@pytest.mark.parametrize("compiled", [True, False])
def test_a_checkpoint_holds_the_decision_and_the_screen_says_it(inputs, taken, monkeypatch, capsys, compiled):
    """A resumed run keeps the checkpoint's decision, even if its --max_steps would change it."""
    name = f"decision-{compiled}"
    monkeypatch.setitem(compile_choice.COMPILE_SECONDS, "cpu", 0.0 if compiled else 30.0)
    run(inputs, name=name, max_steps=2)
    assert bool(taken) is compiled
    word = "compiled" if compiled else "not compiled"
    assert f"\n{word}: compiling saves less than a second of the run" in capsys.readouterr().err
    (saved,) = list_checkpoints(inputs / "runs" / name)
    assert load(saved, ModelConfig.from_json(inputs / "model.json")).is_compiled is compiled
    taken.clear()
    monkeypatch.setitem(compile_choice.COMPILE_SECONDS, "cpu", 30.0 if compiled else 0.0)
    run(inputs, name=name, max_steps=4, resume="auto")
    assert bool(taken) is compiled
    assert f"\n{word}: as the run was that this one goes on from\n" in capsys.readouterr().err
    taken.clear()
    run(inputs, name=name, max_steps=6, resume="auto", no_compile=True)
    assert not taken
    assert "\nnot compiled: --no_compile\n" in capsys.readouterr().err


def test_a_checkpoint_that_does_not_say_can_be_resumed(inputs, taken):
    run(inputs, name="former", max_steps=2)
    (saved,) = list_checkpoints(inputs / "runs" / "former")
    state = torch.load(saved / "training_state.pt", weights_only=True)
    del state["is_compiled"]
    torch.save(state, saved / "training_state.pt")
    (saved / "manifest.json").unlink()
    manifest.write(saved, {})
    assert load(saved, ModelConfig.from_json(inputs / "model.json")).is_compiled is None
    run(inputs, name="former", max_steps=3, resume="auto")
    assert not taken


def test_a_run_leaves_the_settings_of_pytorchs_compiler_as_they_were(monkeypatch, make_config):
    settings, inside = torch._functorch.config, []

    def compiles(*_):
        compile_blocks(torch.nn.ModuleList([Block(SMALL, 0)]))
        inside.append(settings.activation_memory_budget)

    monkeypatch.setattr("gptbert.train._fit", compiles)
    with settings.patch(activation_memory_budget=0.625):
        fit(make_config())
        assert inside == [0.8]
        assert settings.activation_memory_budget == 0.625
