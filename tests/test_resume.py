"""A run killed with SIGKILL and resumed is bitwise equal to an uninterrupted run."""

import random

import pytest

from gptbert.checkpoint.folder import list_checkpoints
from gptbert.monitoring.records import read_records
from tests.runs import Ranks, assert_same_end, flags, losses, train, wait_for_record, write_inputs

STEPS, SAVE_EVERY = 21, 5


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("resume"))


@pytest.mark.usefixtures("bf16_everywhere")
@pytest.mark.parametrize(
    ("optimizer", "world_size", "more"),
    [
        ("lamb", 3, {"hybrid_mode": "batch", "mixed_precision": True, "mask_history": True}),
        ("adamw", 1, {"log_every": 3, "seq_length_growth": True, "mask_history": True, "train_weights": [1, 2]}),
        ("lamb", 2, {"parallel": "fsdp", "hybrid_mode": "batch", "activation_checkpointing": True}),
    ],
)
def test_killed_and_resumed_equals_undisturbed(inputs, optimizer, world_size, more):
    settings = {
        "optimizer": optimizer,
        "max_steps": STEPS,
        "save_every": SAVE_EVERY,
        "keep_checkpoints": 2,
        "global_batch_size": 24,
        "validate_every": 6,
        "validation_steps": 1,
        **more,
    }
    if "train_weights" in settings:
        settings["train_path"] = [inputs / "train.safetensors", inputs / "valid.safetensors"]
    undisturbed = train(inputs, f"{optimizer}-{world_size}-whole", world_size, **settings)
    name = f"{optimizer}-{world_size}-killed"
    run = inputs / "runs" / name
    # in the first half, so that even a slow machine kills it long before its end
    records_at_kill = random.Random(optimizer).randint(2, len(undisturbed) // 2)
    ranks = Ranks(flags(inputs, name=name, **settings), world_size, inputs / f"{name}.log")
    wait_for_record(ranks, run, records_at_kill)
    ranks.kill()
    assert read_records(run / "metrics.jsonl")[-1]["step"] < STEPS, "killed too late to show anything"
    train(inputs, name, world_size, **settings, resume="auto")
    assert_same_end(inputs / "runs" / f"{optimizer}-{world_size}-whole", run)
    assert [path.name for path in list_checkpoints(run)] == ["step_00000020", "step_00000021"]


def test_the_number_of_ranks_may_change_on_the_way(inputs):
    """4 → 2 → 1 → 4: each run resumes from the one before, trains to the end, and has the first run's losses."""
    settings = {
        "config_file": inputs / "no_dropout.json",
        "hybrid_mode": "batch",
        "max_steps": 16,
        "save_every": 4,
        "keep_checkpoints": 9,
        "validate_every": 4,
        "validation_steps": 1,
        "log_every": 3,  # checkpoints fall between records, so loss sums must be saved too
    }
    expected = train(inputs, "ranks-4", 4, **settings)
    previous, first_step = "ranks-4", 0
    for name, world_size in (("ranks-4-2", 2), ("ranks-4-2-1", 1), ("ranks-4-2-1-4", 4)):
        first_step += 4
        start_from = inputs / "runs" / previous / "checkpoints" / f"step_{first_step:08d}"
        records = train(inputs, name, world_size, **settings, resume=start_from)
        wanted = [record for record in expected if record["step"] > first_step]
        assert [record["step"] for record in records] == [record["step"] for record in wanted]
        assert losses(records) == pytest.approx(losses(wanted), rel=1e-5), name
        previous = name
    assert expected[0]["train/loss"] > expected[-2]["train/loss"] + 0.1, "a run that learns nothing shows nothing"
