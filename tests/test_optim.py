"""Parameter groups, the optimizer that the flags name, and the moving average."""

import pytest
import torch
from torch import nn

from gptbert.model import GPTBert
from gptbert.optim import Lamb, WeightAverage, build_optimizer, parameter_groups

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


def test_both_optimizers_lower_a_models_loss(make_config, tiny):
    tokens = torch.randint(5, 64, (4, 17), generator=torch.Generator().manual_seed(0))
    for name in ("lamb", "adamw"):
        torch.manual_seed(0)
        model = GPTBert(tiny)
        optimizer = build_optimizer(make_config(optimizer=name, learning_rate=1e-2), model)
        losses = []
        for _ in range(6):
            result = model(tokens[:, :-1], torch.zeros(4, 16, dtype=torch.long), tokens[:, 1:], causal=True)
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
    """At decay 0.999 a step is a thousandth of the difference, which bf16 would lose."""
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
