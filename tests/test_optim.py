"""Parameter groups, the optimizer chosen by flags, its steps, and the EMA."""

import copy
import math

import pytest
import torch
from torch import nn

from gptbert.model import GPTBert
from gptbert.muon import MuonWithAdamW
from gptbert.optim import Lamb, WeightAverage, build_optimizer, parameter_groups, update_weights
from tests.numerics import same

NOT_DECAYED = {
    "embedding.relative_layer_norm.weight",
    "embedding.relative_layer_norm.bias",
    "head.dense.bias",
    "head.bias",
    *(f"blocks.{layer}.attention.{part}.bias" for layer in range(2) for part in ("query_key", "value_gate", "output")),
}


@pytest.fixture(scope="module")
def model(tiny):
    return GPTBert(tiny)


def test_only_biases_and_layer_norms_do_not_decay(model):
    decayed, plain = parameter_groups(model, 0.1)
    name_of = {param: name for name, param in model.named_parameters()}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert {name_of[param] for param in plain["params"]} == NOT_DECAYED
    names = [name_of[param] for param in decayed["params"]]
    assert {"embedding.relative_embedding", "blocks.0.attention_mix.alpha", "blocks.1.feed_forward_mix.alpha"} <= set(
        names
    )
    assert len(names) + len(NOT_DECAYED) == len(name_of)
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("name", "kind"), [("lamb", Lamb), ("adamw", torch.optim.AdamW)])
def test_the_flags_reach_the_optimizer(make_config, model, name, kind):
    config = make_config(
        optimizer=name,
        learning_rate=0.5,
        weight_decay=0.2,
        optimizer_beta1=0.8,
        optimizer_beta2=0.7,
        optimizer_eps=1e-3,
    )
    optimizer = build_optimizer(config, model)
    assert type(optimizer) is kind
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.5, (0.8, 0.7), 1e-3)


def test_all_optimizers_lower_a_models_loss(make_config, tiny):
    tokens = torch.randint(5, 64, (4, 17), generator=torch.Generator().manual_seed(0))
    for name in ("lamb", "adamw", "muon"):
        torch.manual_seed(0)
        model = GPTBert(tiny)
        optimizer = build_optimizer(make_config(optimizer=name, learning_rate=1e-2), model)
        losses = []
        for _ in range(6):
            result = model.sums(tokens[:, :-1], torch.zeros(4, 16, dtype=torch.long), tokens[:, 1:], causal=True)
            (result.total / result.count).backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append((result.loss / result.count).item())
        assert losses[-1] < losses[0] - 0.3, name


def test_weight_average_is_its_formula():
    model = nn.Linear(5, 7)
    average = WeightAverage(model, 0.9)
    expected = [param.detach().double() for param in model.parameters()]
    for step in range(20):
        with torch.no_grad():
            for param in model.parameters():
                param.add_(torch.randn(param.shape, generator=torch.Generator().manual_seed(step)))
        average.update(model)
        expected = [
            0.9 * old + 0.1 * new.detach().double() for old, new in zip(expected, model.parameters(), strict=True)
        ]
    for param, exact in zip(average.model.parameters(), expected, strict=True):
        torch.testing.assert_close(param.double(), exact, rtol=1e-5, atol=1e-6)


def test_weight_average_moves_by_small_steps():
    """At decay 0.999 a step is a thousandth of the difference, which bf16 would round away."""
    model = nn.Linear(1, 1, bias=False)
    average = WeightAverage(model, 0.999)
    start = average.model.weight.item()
    with torch.no_grad():
        model.weight += 0.01
    average.update(model)
    assert average.model.weight.dtype == torch.float32
    assert average.model.weight.item() - start == pytest.approx(1e-5, rel=0.02)


def test_weight_average_is_a_model_of_its_own(model):
    model.train()
    average = WeightAverage(model, 0.5)
    assert not average.model.training
    assert model.training
    assert not any(param.requires_grad for param in average.model.parameters())
    assert all(param.requires_grad for param in model.parameters())
    own = {param.data_ptr() for param in average.model.parameters()}
    assert own.isdisjoint(param.data_ptr() for param in model.parameters())


def small_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 9), nn.LayerNorm(9), nn.Linear(9, 5))


def set_gradients(model, step):
    generator = torch.Generator().manual_seed(step)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator)


@pytest.fixture
def chosen(backend, monkeypatch):
    """Sets the backend that optimizers use."""
    monkeypatch.setenv("KERNELS_BACKEND", backend)
    return backend


def lamb(model, **second_group):
    decayed, plain = parameter_groups(model, 0.1)
    return Lamb([decayed, {**plain, **second_group}], lr=0.1)


OPTIMIZERS = {
    "lamb": lamb,
    "lamb with a learning rate for each group": lambda model: lamb(model, lr=0.01),
    "adamw": lambda model: torch.optim.AdamW(parameter_groups(model, 0.1), lr=0.01, fused=True),
    "muon": lambda model: MuonWithAdamW(
        [model[0].weight, model[2].weight],
        [{"params": [model[0].bias, model[2].bias, *model[1].parameters()], "weight_decay": 0.0}],
        lr=0.01,
        weight_decay=0.1,
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("max_norm", [0.5, 1e3])
def test_a_step_clips_updates_and_averages(chosen, name, max_norm):
    """Equals clipping, step and EMA update in sequence, with the global norm of all groups."""
    together, apart = small_model(), small_model()
    averages = [WeightAverage(model, 0.9) for model in (together, apart)]
    optimizers = [OPTIMIZERS[name](model) for model in (together, apart)]
    for step in range(3):
        for model in (together, apart):
            set_gradients(model, step)
            if step == 1:
                model[0].bias.grad = None  # its EMA must still move
        expected = nn.utils.clip_grad_norm_(apart.parameters(), max_norm)
        assert (expected > max_norm) == (max_norm == 0.5)
        optimizers[1].step()
        averages[1].update(apart)
        norm = update_weights(optimizers[0], together, averages[0], max_norm)
        torch.testing.assert_close(norm, expected)
        for one, other in ((together, apart), (averages[0].model, averages[1].model)):
            torch.testing.assert_close(dict(one.named_parameters()), dict(other.named_parameters()))


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_steps_whose_gradients_are_not_finite_leave_no_trace(chosen, name, bad):
    """The very first step, before any state exists, and a later one."""
    skipping, straight = small_model(), small_model()
    averages = [WeightAverage(model, 0.9) for model in (skipping, straight)]
    optimizers = [OPTIMIZERS[name](model) for model in (skipping, straight)]
    for step in range(6):
        set_gradients(skipping, step)
        skipping[0].bias.grad = None  # its EMA must not move either
        skipping[0].bias.data.fill_(step)
        is_skipped = step in {0, 3}
        if is_skipped:
            skipping[2].weight.grad[1, 2] = bad
        else:
            set_gradients(straight, step)
            straight[0].bias.grad = None
            straight[0].bias.data.fill_(step)
            update_weights(optimizers[1], straight, averages[1], 0.5)
        norm = update_weights(optimizers[0], skipping, averages[0], 0.5)
        assert norm.isfinite() == (not is_skipped)
        assert same(averages[0].model.parameters(), averages[1].model.parameters())
    assert same(skipping.parameters(), straight.parameters())
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    assert states[0].keys() == states[1].keys()
    for index, state in states[0].items():
        assert state.get("step", 4) == 4, "Muon counts none"
        assert same(state.values(), states[1][index].values())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_by_itself_remembers_no_skipped_one(chosen, name):
    """After a skipped step, a direct `optimizer.step()` must not be skipped."""
    model = small_model()
    optimizer, average = OPTIMIZERS[name](model), WeightAverage(model, 0.9)
    set_gradients(model, 0)
    model[0].weight.grad.fill_(math.nan)
    update_weights(optimizer, model, average, 0.5)
    before = copy.deepcopy(model)
    set_gradients(model, 1)
    optimizer.step()
    assert not any(torch.equal(*pair) for pair in zip(model.parameters(), before.parameters(), strict=True))


def test_lamb_is_one_call_for_all_groups(monkeypatch):
    """Groups that differ only in weight decay share one call."""
    calls = []
    monkeypatch.setattr(
        "gptbert.optim.lamb_step", lambda params, *_, **settings: calls.append(settings["weight_decay"])
    )
    for second_group, expected in (({}, [[0.1] * 3 + [0.0] * 3]), ({"lr": 0.01}, [[0.1] * 3, [0.0] * 3])):
        calls.clear()
        model = small_model()
        set_gradients(model, 0)
        lamb(model, **second_group).step()
        assert calls == expected


def test_a_step_without_any_gradient():
    model = small_model()
    average, before = WeightAverage(model, 0.9), copy.deepcopy(model)
    norm = update_weights(lamb(model), model, average, 1.0)
    assert norm == 0
    for param, old, mean in zip(model.parameters(), before.parameters(), average.model.parameters(), strict=True):
        assert torch.equal(param, old)
        torch.testing.assert_close(mean, old)


@pytest.mark.parametrize("step", [torch.tensor(3.0), torch.tensor(3), 3])
def test_a_state_of_earlier_versions_can_be_loaded(device, step):
    """Earlier versions kept LAMB's step on the CPU; other optimizers' steps may be integers."""
    params = [torch.ones(4, device=device, requires_grad=True)]
    optimizer = Lamb(params)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    state = optimizer.state_dict()
    state["state"][0]["step"] = step
    optimizer.load_state_dict(state)
    loaded = optimizer.state[params[0]]["step"]
    assert (loaded.dtype, loaded.device, loaded.shape, loaded.item()) == (torch.float32, params[0].device, (), 3)
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == 4


def test_a_learning_rate_may_be_a_tensor(device):
    results = []
    for lr in (0.25, torch.tensor(0.25, device=device)):
        param = torch.ones(4, device=device, requires_grad=True)
        optimizer = Lamb([param], lr=lr)
        param.grad = torch.ones_like(param)
        optimizer.step()
        copy.deepcopy(optimizer).step()
        results.append(param.detach())
    assert torch.equal(*results)


def test_settings_out_of_range_are_errors():
    for settings, message in (
        ({"lr": -1.0}, "lr: -1.0"),
        ({"eps": float("nan")}, "eps: nan"),
        ({"betas": (0.9, 1.0)}, "beta2: 1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            Lamb([torch.ones(1, requires_grad=True)], **settings)
