"""Runs on several processes: results must not depend on the number of ranks."""

import socket
import subprocess
import sys

import pytest

from tests.runs import ROOT, Ranks, flags, losses, train, write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("distributed"))


def assert_same_losses(one, other):
    assert len(losses(one)) == len(losses(other)) > 60
    assert losses(one) == pytest.approx(losses(other), rel=1e-5)


def test_batch_mode_does_not_depend_on_ranks_or_local_batch_size(inputs):
    common = {
        "config_file": inputs / "no_dropout.json",
        "hybrid_mode": "batch",
        "hybrid_numerator": 1,
        "hybrid_denominator": 3,
        "log_every": 1,
    }
    one = train(inputs, "one", local_batch_size=64, **common)
    assert one[0]["train/loss"] > one[-3]["train/loss"] + 0.1, "a run that learns nothing shows nothing"
    assert_same_losses(one, train(inputs, "one-small", local_batch_size=3, **common))
    assert_same_losses(one, train(inputs, "two", 2, local_batch_size=4, **common))
    assert_same_losses(one, train(inputs, "four", 4, local_batch_size=64, **common))


def test_every_option_of_the_step_at_once_does_not_depend_on_ranks(inputs):
    """Two corpora, row growth, token-weighted loss, mask history over several epochs, ranks without rows."""
    common = {
        "train_path": [inputs / "train.safetensors", inputs / "valid.safetensors"],
        "train_weights": [2, 1],
        "config_file": inputs / "no_dropout.json",
        "hybrid_mode": "batch",
        "hybrid_numerator": 1,
        "hybrid_denominator": 2,
        "global_batch_size": 128,
        "batch_reduction": 64,  # two rows in the first step, one for each objective, so some ranks have none
        "seq_length_growth": True,
        "token_weighted_loss": True,
        "mask_history": True,
    }
    one = train(inputs, "all-one", **common)
    assert one[-2]["train/corpus/valid/epochs"] > 4
    assert_same_losses(one, train(inputs, "all-three", 3, **common))


def test_rank_mode_does_not_depend_on_the_number_of_ranks(inputs):
    common = {"config_file": inputs / "no_dropout.json", "hybrid_mode": "rank"}
    four, eight = train(inputs, "rank-four", 4, **common), train(inputs, "rank-eight", 8, **common)
    assert_same_losses(four, eight)


@pytest.mark.parametrize(("numerator", "trained", "absent"), [(0, "clm", "mlm"), (1, "mlm", "clm")])
def test_a_run_of_one_objective_trains_that_one_and_validates_both(inputs, numerator, trained, absent):
    records = train(
        inputs, f"pure-{trained}", hybrid_numerator=numerator, hybrid_denominator=1, max_steps=4, mixed_precision=True
    )
    first = records[0]
    assert first["train/loss"] == first[f"train/{trained}/loss"]
    assert f"train/{absent}/loss" not in first
    assert {"validation/mlm/loss", "validation/clm/loss"} <= set(records[-1])


def test_the_users_own_command(inputs):
    """The project description's command, flag by flag, on four CPU processes, with fewer steps."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run",
        "--nproc_per_node=4", "--nnodes=1", "--node_rank=0", "--master_addr=127.0.0.1", f"--master_port={port}",
        "train_distributed.py",
        f"--train_path={inputs / 'train.safetensors'}",
        f"--valid_path={inputs / 'valid.safetensors'}",
        f"--config_file={inputs / 'model.json'}",
        f"--tokenizer_path={inputs / 'tokenizer.json'}",
        f"--output_dir={inputs / 'runs'}",
        "--name=Run Name",
        "--hybrid_numerator=1", "--hybrid_denominator=4", "--seq_length=128",
        "--local_batch_size=32", "--global_batch_size=128", "--learning_rate=1e-3", "--max_steps=4",
        "--optimizer=lamb", "--weight_decay=0.1", "--warmup_proportion=0.016", "--cooldown_proportion=0.016",
        "--mask_p_start=0.3", "--mask_p_end=0.15", "--mask_random_p=0.1", "--mask_keep_p=0.1",
        "--mixed_precision", "--validate_every=2", "--save_every=2", "--seed=42",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "hybrid mode rank" in done.stderr
    run = inputs / "runs" / "Run Name"
    for step in ("step_00000002", "step_00000004"):
        names = {file.name for file in (run / "checkpoints" / step).iterdir()}
        assert {"model.safetensors", "ema.safetensors", "training_state.pt", "tokenizer.json"} <= names
    assert list((run / "wandb").glob("offline-run-*")), "wandb records offline without an account"


def test_an_indivisible_world_ends_with_one_line(inputs):
    arguments = flags(inputs, name="indivisible", hybrid_mode="rank")
    output, status = Ranks(arguments, 2, inputs / "indivisible.log").communicate()
    assert status == 1
    (line,) = output.splitlines()
    assert line.startswith("error: --hybrid_mode rank with --hybrid_denominator 4 needs 4, 8, 12, … processes, not 2;")
