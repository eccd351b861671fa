"""Mixed precision: bf16 where the device has instructions for it, fp32 elsewhere, and a line that says so."""

import json

import pytest
import torch

from gptbert.checkpoint.folder import list_checkpoints
from gptbert.command_line import parse
from gptbert.config import TrainConfig
from gptbert.distributed.hardware import has_bf16
from gptbert.distributed.world import World
from gptbert.monitoring.records import read_records
from gptbert.train import fit
from gptbert.training import preparation
from tests.runs import assert_same_checkpoint, flags, take_bf16, write_inputs

CPU = torch.device("cpu")
SETTINGS = {"no_compile": True, "max_steps": 3, "log_every": 1, "validation_steps": 1}


@pytest.fixture
def without_bf16(monkeypatch):
    take_bf16(monkeypatch.setattr, is_there=False)


@pytest.mark.parametrize(
    ("known", "has"),
    [
        ({"architecture": "x86_64", "avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"architecture": "x86_64", "avx2": True}, False),
        ({"architecture": "x86_64", "avx512_bf16": True, "amx_bf16": False}, True),
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": True}, True),
        ({"architecture": "aarch64", "neon": True, "bf16": False}, False),
        ({"architecture": "aarch64", "neon": True, "bf16": True}, True),
        ({}, True),
    ],
)
def test_a_cpu_is_asked_for_its_instructions(monkeypatch, known, has):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    assert has_bf16(CPU) is has


def test_an_older_pytorch_knows_nothing(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert has_bf16(CPU)


@pytest.mark.usefixtures("without_bf16")
def test_without_bf16_a_run_computes_in_fp32_and_says_so(tmp_path, capfd):
    inputs = write_inputs(tmp_path)
    for name, is_mixed in (("mixed", True), ("fp32", False)):
        fit(parse(TrainConfig, flags(inputs, name=name, mixed_precision=is_mixed, **SETTINGS)))
        said = "--mixed_precision: computing in fp32, since " in capfd.readouterr().err
        assert said is is_mixed
    mixed, fp32 = (list_checkpoints(inputs / "runs" / name)[-1] for name in ("mixed", "fp32"))
    assert_same_checkpoint(mixed, fp32)
    assert json.loads((mixed / "train_config.json").read_text())["mixed_precision"] is False


def test_with_bf16_it_computes_in_bf16(tmp_path, bf16_everywhere):
    inputs = write_inputs(tmp_path)
    losses = {}
    for is_mixed in (True, False):
        name = f"mixed {is_mixed}"
        fit(parse(TrainConfig, flags(inputs, name=name, mixed_precision=is_mixed, **SETTINGS)))
        losses[is_mixed] = read_records(inputs / "runs" / name / "metrics.jsonl")[0]["train/loss"]
    assert losses[True] != losses[False]
    assert losses[True] == pytest.approx(losses[False], rel=1e-2)


def test_one_host_without_bf16_decides_for_all(make_config, capfd, bf16_everywhere):
    class Two(World):
        def all_gather(self, value):
            return [value, True]

    config = preparation.with_fast_precision(make_config(mixed_precision=True), Two(0, 2, CPU))
    assert not config.mixed_precision
    assert "since another host has no instructions" in capfd.readouterr().err
