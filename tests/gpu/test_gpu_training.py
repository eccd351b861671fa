"""Whole runs on the device: both backends, the command line, and bitwise resuming."""

import json
import os
import subprocess
import sys

import pytest

from gptbert.checkpoint.folder import list_checkpoints
from gptbert.command_line import parse
from gptbert.config import TrainConfig
from gptbert.monitoring.records import read_records
from gptbert.train import fit
from tests.lanes import DEVICE
from tests.runs import MODEL, ROOT, assert_same_checkpoint, flags, losses, train


@pytest.fixture(scope="module")
def settings(inputs, device, sized):
    """Flags of a run with a checkpoint half-way; on a GPU the model is wide enough for tensor cores."""
    shape = sized(
        {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_hidden_layers": 3},
        {"num_hidden_layers": 1},
    )
    (inputs / "lane.json").write_text(json.dumps(MODEL | shape))
    return {
        "device": device.type,
        "config_file": inputs / "lane.json",
        "seq_length": sized(64, 16),
        "local_batch_size": sized(16, 4),
        "global_batch_size": sized(48, 8),
        "max_steps": sized(8, 4),
        "save_every": sized(4, 2),
        "validate_every": sized(4, 2),
        "validation_steps": 1,
        "no_compile": True,
        "kernel_check": "off",  # see tests/gpu/test_gpu_kernels.py
    }


def run(inputs, name, settings):
    """Train in this process; returns the records and the run's folder."""
    fit(parse(TrainConfig, flags(inputs, name=name, **settings)))
    folder = inputs / "runs" / name
    return read_records(folder / "metrics.jsonl"), folder


def assert_went_on_to_the_bit(whole, other):
    """A run and one resumed from its first checkpoint are bitwise equal; each is given as records and folder."""
    later = [record for record in whole[0] if record["step"] >= other[0][0]["step"]]
    assert losses(other[0]) == losses(later)
    assert_same_checkpoint(list_checkpoints(other[1])[-1], list_checkpoints(whole[1])[-1])


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 1e-2)])
def test_both_backends_train_the_same(inputs, settings, sized, precision, tolerance):
    """Masks and dropout are bitwise equal; the rest differs by rounding, in bf16 by that of the logits' gradient."""
    if DEVICE == "cpu" and precision == "fp32":
        pytest.skip("tests/test_trainer.py does the same on a CPU")
    settings = settings | {"mixed_precision": precision == "bf16", "max_steps": sized(8, 2)}
    found = {}
    for kernels in ("triton", "torch"):
        records, folder = run(inputs, f"{kernels}-{precision}", settings | {"kernels": kernels})
        assert json.loads((folder / "config.json").read_text())["kernels"] == kernels
        found[kernels] = losses(records)
    assert found["triton"] == pytest.approx(found["torch"], rel=tolerance)
    training = found["triton"][: settings["max_steps"]]
    assert abs(training[-1] - training[0]) > 0.01, "a run in which nothing moves shows nothing"


@pytest.mark.parametrize(
    ("optimizer", "more"),
    [
        ("lamb", {"mixed_precision": True, "mask_history": True}),
        ("adamw", {"seq_length_growth": True, "learning_rate": 1e-3}),
        ("muon", {"mixed_precision": True, "activation_checkpointing": True, "learning_rate": 1e-3}),
    ],
)
def test_a_run_goes_on_to_the_bit(inputs, settings, optimizer, more):
    whole = run(inputs, optimizer, settings | more | {"optimizer": optimizer})
    again = settings | more | {"optimizer": optimizer, "resume": list_checkpoints(whole[1])[0]}
    assert_went_on_to_the_bit(whole, run(inputs, f"{optimizer}-again", again))


def test_the_command_trains_as_the_function_does(inputs, settings, sized):
    """In its own process, after the kernel check, which must not change the run."""
    settings = settings | {"mixed_precision": True, "max_steps": settings["save_every"]}
    expected, folder = run(inputs, "function", settings)
    records = train(inputs, "command", **settings | {"kernel_check": sized("on", "off")})
    assert losses(records) == losses(expected)
    assert_same_checkpoint(list_checkpoints(inputs / "runs" / "command")[-1], list_checkpoints(folder)[-1])


def run_compiled(inputs, name, settings):
    """Train in a separate process, compiled; returns the records and the run's folder."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.compiled_run", *flags(inputs, name=name, **settings)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) >= 4, "two graphs to train, two to evaluate"
    folder = inputs / "runs" / name
    return read_records(folder / "metrics.jsonl"), folder


def test_a_compiled_run_goes_on_to_the_bit_in_another_process(inputs, settings):
    settings = settings | {"mixed_precision": True}
    compiled = settings | {"no_compile": False}
    whole = run_compiled(inputs, "compiled", compiled)
    again = run_compiled(inputs, "compiled-again", compiled | {"resume": list_checkpoints(whole[1])[0]})
    assert_went_on_to_the_bit(whole, again)
    eager, _ = run(inputs, "eager", settings)
    assert losses(whole[0]) == pytest.approx(losses(eager), rel=2e-2)
