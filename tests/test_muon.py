"""Muon with AdamW: assignment of parameters, updates equal to PyTorch's own, and whole runs."""

import copy
import math
from queue import SimpleQueue

import pytest
import torch

from gptbert.checkpoint.checkpoint import load
from gptbert.checkpoint.folder import list_checkpoints
from gptbert.command_line import parse
from gptbert.config import ModelConfig, TrainConfig
from gptbert.data.hybrid_plan import HybridPlan
from gptbert.data.inputs import Inputs
from gptbert.distributed.world import connect
from gptbert.errors import InputError
from gptbert.model import GPTBert
from gptbert.muon import hidden_matrices
from gptbert.optim import build_optimizer
from gptbert.train import fit
from gptbert.trainer import Trainer
from tests.runs import assert_same_checkpoint, flags, on_ranks, write_inputs

MATRICES = {
    "head.dense.weight",
    *(
        f"blocks.{layer}.attention.{part}.weight"
        for layer in range(2)
        for part in ("query_key", "value_gate", "output")
    ),
    *(f"blocks.{layer}.feed_forward.{part}.weight" for layer in range(2) for part in ("up", "down")),
}


@pytest.fixture
def model(tiny):
    torch.manual_seed(0)
    return GPTBert(tiny)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("muon"), train_characters=20_000)


def set_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator)


def test_matrices_between_layers_are_muons_and_all_else_adamws(model, make_config):
    optimizer = build_optimizer(make_config(optimizer="muon", weight_decay=0.2), model)
    name_of = {param: name for name, param in model.named_parameters()}
    muons, decayed, plain = [{name_of[param] for param in group["params"]} for group in optimizer.param_groups]
    assert muons == MATRICES
    assert decayed == {
        "embedding.word_embedding.weight", "embedding.relative_embedding",
        *(f"blocks.{layer}.{mix}_mix.alpha" for layer in range(2) for mix in ("attention", "feed_forward")),
    }  # fmt: skip
    assert muons | decayed | plain == set(name_of.values())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(name_of)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.2, 0.0]


def test_a_step_is_that_of_pytorchs_two_optimizers(model, make_config):
    """Also with a varying learning rate, and after saving and loading the state."""
    config = make_config(optimizer="muon", learning_rate=0.02, weight_decay=0.2, optimizer_eps=1e-6)
    apart, optimizer = copy.deepcopy(model), build_optimizer(config, model)
    named = dict(apart.named_parameters())
    rest = [
        {"params": [p for n, p in named.items() if n not in MATRICES and ("bias" in n or "layer_norm" in n) == plain],
         "weight_decay": 0.0 if plain else 0.2}
        for plain in (False, True)
    ]  # fmt: skip
    both = (
        torch.optim.Muon(
            [named[name] for name in MATRICES], lr=0.02, weight_decay=0.2, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(rest, lr=0.02, betas=(0.9, 0.98), eps=1e-6, fused=True),
    )
    for step in range(4):
        if step == 2:
            saved, optimizer = copy.deepcopy(optimizer.state_dict()), build_optimizer(config, model)
            optimizer.load_state_dict(saved)
        for group in (*optimizer.param_groups, *both[0].param_groups, *both[1].param_groups):
            group["lr"] = 0.02 / (1 + step)
        for each in (model, apart):
            set_gradients(each, step)
        optimizer.step()
        for each in both:
            each.step()
        for name, param in model.named_parameters():
            assert torch.equal(param, named[name]), name


def test_an_update_is_nearly_orthogonal_and_as_large_as_adamws(model, make_config):
    optimizer = build_optimizer(make_config(optimizer="muon", learning_rate=0.5, weight_decay=0.0), model)
    before = copy.deepcopy(model)
    set_gradients(model, 0)
    optimizer.step()
    for param, old in zip(hidden_matrices(model), hidden_matrices(before), strict=True):
        update = (old - param).detach() / 0.5
        singular = torch.linalg.svdvals(update) / (0.2 * math.sqrt(max(update.shape)))
        assert singular.min() > 0.3, "Newton-Schulz leaves about 0.7 to 1.2 of them"
        assert singular.max() < 1.4
        assert update.square().mean().sqrt() == pytest.approx(0.2, rel=0.3), "the usual size of AdamW's"


@pytest.mark.usefixtures("bf16_everywhere")
def test_a_run_that_is_resumed_is_the_run_that_went_on(inputs):
    settings = {"optimizer": "muon", "learning_rate": 2e-3, "max_steps": 6, "save_every": 3, "mixed_precision": True}
    fit(parse(TrainConfig, flags(inputs, name="whole", **settings)))
    whole = list_checkpoints(inputs / "runs" / "whole")
    fit(parse(TrainConfig, flags(inputs, name="branch", resume=whole[0], **settings)))
    assert_same_checkpoint(whole[-1], list_checkpoints(inputs / "runs" / "branch")[-1])


def test_only_muon_has_muons_state(inputs):
    """A different optimizer's state is refused as damaged, and so is an incomplete one."""
    fit(parse(TrainConfig, flags(inputs, name="damaged", optimizer="muon", max_steps=1)))
    (path,) = list_checkpoints(inputs / "runs" / "damaged")
    model = ModelConfig.from_json(inputs / "model.json")
    state = torch.load(path / "training_state.pt", weights_only=True)
    first = state["optimizer"]["state"][0]
    assert list(first) == ["momentum_buffer"]
    load(path, model)
    for buffer in (first["momentum_buffer"][1:], first["momentum_buffer"].T.contiguous()):
        state["optimizer"]["state"][0] = {"momentum_buffer": buffer}
        torch.save(state, path / "training_state.pt")
        with pytest.raises(InputError, match="of other shapes than the weights"):
            load(path, model)
    state["optimizer"]["state"][0] = first
    torch.save(state, path / "training_state.pt")
    settings = (path / "train_config.json").read_text(encoding="utf-8")
    (path / "train_config.json").write_text(settings.replace('"muon"', '"adamw"'), encoding="utf-8")
    with pytest.raises(InputError, match="optimizer state is of another form"):
        load(path, model)


def train_on_rank(rank, world_size, inputs, results):
    settings = {"optimizer": "muon", "hybrid_mode": "batch", "warmup_proportion": 0, "timeout": 60}
    config = parse(TrainConfig, flags(inputs, config_file=inputs / "no_dropout.json", **settings))
    with connect(config) as world:
        trainer = Trainer(config, Inputs.open(config), HybridPlan(config, world_size), world)
        for trainer.step in range(6):
            trainer.train_step(trainer.loader.load(trainer.step))
        loss = trainer.validation_record()["validation/mlm/loss"]
        results.put((rank, (loss, {name: param.tolist() for name, param in trainer.model.named_parameters()})))


def test_ranks_agree_to_the_bit_and_with_a_single_one_in_the_loss(inputs):
    alone = SimpleQueue()
    train_on_rank(0, 1, inputs, alone)
    _, (loss, weights) = alone.get()
    two = on_ranks(2, train_on_rank, 2, inputs)
    assert two[0] == two[1]
    shared, others = two[0]
    assert weights != others, "or rows were not divided"
    assert loss < math.log(320) - 0.3, "a run that learns nothing shows nothing"
    assert shared == pytest.approx(loss, rel=1e-3)


def test_sharded_matrices_are_refused(make_config):
    with pytest.raises(InputError, match="--optimizer muon needs whole matrices"):
        make_config(optimizer="muon", parallel="fsdp")
