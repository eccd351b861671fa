"""GPU behavior that can be tested without one: loading a GPU's checkpoints, and devices of kernel launches."""

import dataclasses
import importlib
import itertools
from contextlib import contextmanager

import pytest
import torch

from gptbert.checkpoint import checkpoint
from gptbert.checkpoint.folder import list_checkpoints
from gptbert.command_line import parse
from gptbert.config import TrainConfig
from gptbert.data.hybrid_plan import HybridPlan
from gptbert.data.inputs import Inputs
from gptbert.distributed.world import World
from gptbert.io.torch_file import load_torch_file
from gptbert.train import fit
from gptbert.trainer import Trainer
from kernels.configuration import TRITON_OPERATIONS
from tests.runs import assert_same, flags, write_inputs

CUDA_STATE = torch.arange(16, dtype=torch.uint8)  # stands in for the state of a GPU's generator


def test_tensors_of_a_gpu_are_read_onto_the_cpu(tmp_path, monkeypatch):
    """Saved with the location tag that torch.save writes for a GPU."""
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    saved = {"step": torch.tensor(3.0), "moments": [torch.randn(4, 5), torch.randn(7, dtype=torch.bfloat16).float()]}
    torch.save(saved, tmp_path / "state.pt")
    monkeypatch.undo()
    assert b"cuda:0" in (tmp_path / "state.pt").read_bytes()
    assert_same(load_torch_file(tmp_path / "state.pt"), saved)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Config of a run with a checkpoint at step 2."""
    inputs = write_inputs(tmp_path_factory.mktemp("devices"), train_characters=10_000)
    config = parse(TrainConfig, flags(inputs, name="run", max_steps=2, log_every=3))
    fit(config)
    return config


def resumed_generators(config, change):
    """PyTorch's random state after resuming from a checkpoint with changed states, and the unchanged one."""
    inputs = Inputs.open(config)
    loaded = checkpoint.load(list_checkpoints(config.run_dir)[-1], inputs.model_config)
    states = [{"random": change(state["random"]), "sums": torch.ones(2, 4)} for state in loaded.rank_states]
    trainer = Trainer(config, inputs, HybridPlan(config, 1), World(0, 1, torch.device("cpu")))
    torch.manual_seed(99)
    trainer.restore(dataclasses.replace(loaded, rank_states=states))
    assert trainer.sums.sums.tolist() == [[1.0] * 4] * 2
    return torch.get_rng_state(), loaded.rank_states[0]["random"]["cpu"]


def test_the_same_kind_of_device_goes_on_with_its_random_numbers(config):
    restored, saved = resumed_generators(config, lambda random: random)
    assert torch.equal(restored, saved)


def test_another_kind_of_device_goes_on_with_new_random_numbers(config):
    """On a GPU dropout uses the GPU's generator, so the checkpoint's CPU state is still the initial one."""
    restored, saved = resumed_generators(config, lambda random: random | {"cuda": CUDA_STATE})
    assert not torch.equal(restored, saved)
    torch.manual_seed(99)
    assert not torch.equal(restored, torch.get_rng_state())
    torch.manual_seed((config.seed << 20) + (2 << 10))
    assert torch.equal(restored, torch.get_rng_state()), "a function of the seed and the step"


@pytest.mark.parametrize("operation", TRITON_OPERATIONS)
def test_kernels_are_launched_on_the_device_of_their_tensors(operation, monkeypatch):
    """Triton launches on the current device, which may differ from the tensors'; tested in the interpreter."""
    inside, launches = [], []

    @contextmanager
    def device_of(tensor):
        inside.append(tensor)
        yield
        inside.pop()

    interpreter = importlib.import_module("triton.runtime.interpreter")
    launch = interpreter.GridExecutor.__call__

    def watched(*arguments, **options):
        launches.append(bool(inside))
        return launch(*arguments, **options)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", watched)
    comparisons = importlib.import_module(f"kernels.{operation}.check").comparisons(torch.device("cpu"), "triton")
    for _ in itertools.islice(comparisons, 12):
        pass
    assert launches
    assert all(launches)
