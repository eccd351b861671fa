"""Counts of FLOPs and bytes, against the model's formula and against short sums by hand."""

import dataclasses
from pathlib import Path

import pytest

from benchmarks.roofline import (
    H100,
    Limits,
    RooflineConfig,
    TrainingStep,
    Work,
    copied_count,
    parameter_count,
    run,
    table,
)
from gptbert.config import ModelConfig
from gptbert.model import GPTBert
from gptbert.monitoring.flops import training_flops
from tests.conftest import TINY

SMALL = ModelConfig.from_json("configs/small.json")


def part(step, name):
    (found,) = [each for each in step.parts() if each.name == name]
    return found


@pytest.mark.parametrize("labeled_fraction", [0.15, 1.0])
def test_products_are_the_needed_flops(labeled_fraction):
    step = TrainingStep(SMALL, rows=32, seq_length=128, labeled_fraction=labeled_fraction)
    counted = sum(each.fewest.flops for each in step.parts() if each.name != "optimizer and casts")
    assert counted == pytest.approx(step.tokens * training_flops(SMALL, 128, labeled_fraction))


def test_nothing_takes_less_than_the_fewest():
    for each in TrainingStep(SMALL, rows=32, seq_length=512, labeled_fraction=0.15).parts():
        assert each.ours.flops >= each.fewest.flops
        assert each.ours.bytes >= each.fewest.bytes
        # mixes in groups read less than each for itself
        assert each.fused.bytes >= each.fewest.bytes or each.name == "layer weighting"
        assert each.fused.flops >= each.fewest.flops


def test_layer_weighting_by_hand():
    # one layer, two mixes: x_1 reads 2 representations, x_2 reads 3; then α's gradients read 2 and 3 and a gradient,
    # and those of y_1 and y_2 read 2 and 1 gradients
    step = TrainingStep(dataclasses.replace(TINY, num_hidden_layers=1), rows=2, seq_length=8, labeled_fraction=1.0)
    entries = 4 * 16 * TINY.hidden_size
    forward = (2 + 1) + (3 + 1)
    backward = (2 + 1) + (3 + 1) + (2 + 1) + (1 + 1)
    assert part(step, "layer weighting").fewest == Work(0, (forward + backward) * entries)


def test_optimizer_moves_52_bytes_a_parameter():
    parameters = sum(param.numel() for param in GPTBert(TINY).parameters())
    assert parameter_count(TINY) == parameters
    work = part(TrainingStep(TINY, 1, 8, 1.0), "optimizer and casts")
    assert work.fewest.bytes == 52 * parameters
    blocks = [param for name, param in GPTBert(TINY).blocks.named_parameters() if "norm" not in name]
    copied = sum(param.numel() for param in blocks if param.numel() > TINY.hidden_size)
    copied += TINY.vocab_size * TINY.hidden_size
    assert copied_count(TINY) == copied
    biases = TINY.num_hidden_layers * 4 * TINY.hidden_size
    assert copied_count(TINY, least_dimensions=2) == copied - biases
    assert work.ours.bytes == (52 + 6) * parameters
    assert work.fused.bytes == (52 + 6 + 4) * (parameters - copied) + (52 + 2) * copied + 4 * biases


def test_a_part_takes_what_takes_longer_and_its_launches():
    limits = Limits("", flops=100.0, bandwidth=10.0, launch=0.25)
    assert Work(200, 10).seconds(limits) == 2
    assert Work(200, 40).seconds(limits) == 4
    assert Work(200, 40, 4).seconds(limits) == 5


def test_the_table_adds_up(capsys):
    run(RooflineConfig(rows=4))
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines == table(TrainingStep(SMALL, 4, 128, 0.15), Limits("", 989.4e12, 3.35e12, 0.6e-6)).splitlines()
    columns = list(zip(*([float(cell) for cell in line.split("|")[2:-1]] for line in lines[2:]), strict=True))
    for *parts, total in columns:
        assert sum(parts) == pytest.approx(total, abs=0.05 * len(parts))


@pytest.mark.parametrize("rows", [32, 256])
@pytest.mark.parametrize("name", ["small", "base"])
def test_the_tables_in_the_documentation_are_these(name, rows):
    step = TrainingStep(ModelConfig.from_json(f"configs/{name}.json"), rows, 128, 0.15)
    assert table(step, H100) in Path("docs/performance.md").read_text()
