"""Launches of a training step by the fused kernels: counted, below the bar, and in proportion to the layers."""

import dataclasses

import pytest
import torch
import triton
import triton.language as tl

from benchmarks import launches as module
from benchmarks.launches import BAR, PHASES, Launches, count
from benchmarks.roofline import LAUNCHES, LAYER_LAUNCHES
from gptbert.config import ModelConfig
from kernels.linear import Packed, add_weight_gradient, linear

SMALL = ModelConfig.from_json("configs/small.json")
REACHED = 543  # for 12 layers


def total(counted):
    return sum(map(counted.total, PHASES))


@pytest.fixture(scope="module")
def of_twelve_layers():
    return count(SMALL)


def test_a_step_of_twelve_layers_stays_below_the_bar(of_twelve_layers):
    assert SMALL.num_hidden_layers == 12
    assert 0 < total(of_twelve_layers) <= REACHED < BAR
    assert of_twelve_layers.total("other") < 40, "what recorded steps leave to the host"


def test_the_roofline_counts_the_same(of_twelve_layers):
    three = total(count(dataclasses.replace(SMALL, num_hidden_layers=3)))
    for layers, counted in ((12, total(of_twelve_layers)), (3, three)):
        assert LAUNCHES + LAYER_LAUNCHES * layers == pytest.approx(counted, rel=0.03)


def test_every_fused_kernel_is_launched(of_twelve_layers):
    names = {name for phase in PHASES for name in of_twelve_layers.counts[phase]}
    ours = {name.partition(".")[0] for name in names if "::" not in name}
    assert ours >= {"attention_context", "gated_norm", "normalize", "dropout", "depth_mix", "lamb"}
    assert "aten::_foreach_copy_" not in of_twelve_layers.counts["update"], "LAMB's own pass copies the weights"
    assert not names & {"aten::bitwise_xor", "aten::gelu", "aten::softmax"}


@triton.jit
def double_kernel(x_ptr, size: tl.constexpr):
    offsets = tl.arange(0, size)
    tl.store(x_ptr + offsets, 2 * tl.load(x_ptr + offsets))


def test_what_counts_as_a_launch():
    x, weight = torch.ones(4), torch.ones(6, 4)
    launches = Launches()
    with launches:
        with launches.during("forward"):
            (x + 1).view(2, 2).T[0].expand(2, 2)
            torch.empty(3)
            double_kernel[(3,)](x, size=4)
        with launches.during("backward"):
            add_weight_gradient(torch.ones(2, 6), torch.ones(2, 4), weight)
            linear(torch.ones(2, 4), Packed.of([weight], torch.float32))
        x.mul_(2)
    assert set(launches.counts["forward"].values()) == {1}
    assert {name.split(".")[-1] for name in launches.counts["forward"]} == {"aten::add", "double_kernel"}
    assert launches.counts["backward"]["aten::addmm_"] == 1
    assert launches.counts["backward"]["aten::mm"] == 1
    assert launches.counts["other"]["aten::mul_"] == 1
    assert launches.total("forward") == 2


def test_more_launches_than_allowed_end_the_command_with_1(monkeypatch, capsys, of_twelve_layers):
    monkeypatch.setattr(module, "count", lambda _: of_twelve_layers)
    module.run(module.LaunchesConfig())
    assert f"in all: {total(of_twelve_layers)}, allowed {BAR}" in capsys.readouterr().out
    monkeypatch.setattr(module, "BAR", 100)
    with pytest.raises(SystemExit, match="1"):
        module.run(module.LaunchesConfig(json=True))
    assert f"{total(of_twelve_layers)} launches, 100 allowed" in capsys.readouterr().err
