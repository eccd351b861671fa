"""Steps with NaN or infinite gradients: skipped on all ranks, counted, and limited in a row."""

import copy
import math

import pytest

from gptbert.checkpoint.folder import list_checkpoints
from gptbert.checkpoint.saved_model import load_model
from gptbert.command_line import parse, run_command
from gptbert.config import TrainConfig
from gptbert.data.hybrid_plan import HybridPlan
from gptbert.data.inputs import Inputs
from gptbert.distributed.world import connect
from gptbert.monitoring.records import read_records
from gptbert.train import fit
from gptbert.trainer import Trainer
from tests.runs import assert_same, assert_same_checkpoint, flags, on_ranks, write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("skipping"), train_characters=20_000)


def state_of(trainer):
    """The state that a skipped step must not change."""
    return copy.deepcopy(
        {
            "model": dict(trainer.model.state_dict()),
            "ema": dict(trainer.ema.model.state_dict()),
            "optimizer": trainer.optimizer.state_dict()["state"],
            "sums": trainer.sums.sums,
        }
    )


def skip_on_two_ranks(rank, inputs, optimizer, bad, results):
    """Only rank 1 has bad gradients, in its second and third step."""
    config = parse(TrainConfig, flags(inputs, optimizer=optimizer, hybrid_mode="batch", timeout=60))
    said = []
    with connect(config) as world:
        trainer = Trainer(config, Inputs.open(config), HybridPlan(config, 2), world)
        for trainer.step in range(4):
            before, is_bad = state_of(trainer), trainer.step in {1, 2}
            if rank == 1 and is_bad:
                hook = trainer.model.head.bias.register_hook(lambda gradient: gradient + bad)
            norm = trainer.train_step(trainer.loader.load(trainer.step))
            if rank == 1 and is_bad:
                hook.remove()
            try:
                assert_same(state_of(trainer), before)
                is_same = True
            except AssertionError:
                is_same = False
            said.append((norm.isfinite().item(), is_same))
        finite = all(param.isfinite().all() for param in trainer.model.parameters())
        results.put((rank, (said, trainer.skipped_steps.counts.tolist(), finite)))


@pytest.mark.parametrize(("optimizer", "bad"), [("lamb", math.nan), ("adamw", math.inf)])
def test_bad_gradients_of_one_rank_are_skipped_by_all(inputs, optimizer, bad):
    said = on_ranks(2, skip_on_two_ranks, inputs, optimizer, bad)
    expected = [(True, False), (False, True), (False, True), (True, False)]
    assert said == {rank: (expected, [2, 0, 2], True) for rank in range(2)}


@pytest.fixture
def poisoned(monkeypatch):
    """A set of steps whose gradients are replaced by NaN."""
    steps, train_step = set(), Trainer.train_step

    def poisoned_step(trainer, rows):
        if trainer.step not in steps:
            return train_step(trainer, rows)
        hook = trainer.model.head.bias.register_hook(lambda gradient: gradient * math.nan)
        try:
            return train_step(trainer, rows)
        finally:
            hook.remove()

    monkeypatch.setattr(Trainer, "train_step", poisoned_step)
    return steps


@pytest.mark.parametrize("log_every", [1, 4])
def test_skipped_steps_are_counted_and_the_count_is_resumed(inputs, poisoned, log_every):
    poisoned |= {5, 6, 9}
    settings = {"max_steps": 12, "save_every": 6, "keep_checkpoints": 9, "log_every": log_every, "validate_every": 0}
    whole, again = f"counted-{log_every}", f"counted-again-{log_every}"
    fit(parse(TrainConfig, flags(inputs, name=whole, **settings)))
    records = [
        record for record in read_records(inputs / "runs" / whole / "metrics.jsonl") if "train/skipped_steps" in record
    ]
    for record in records:
        skipped = {step for step in poisoned if step < record["step"]}
        assert record["train/skipped_steps"] == len(skipped)
        window = set(range(record["step"] - log_every, record["step"]))
        assert ("train/loss" in record) == bool(window - poisoned)
        assert math.isfinite(record.get("train/loss", 0.0))
    half_way = inputs / "runs" / whole / "checkpoints" / "step_00000006"
    fit(parse(TrainConfig, flags(inputs, name=again, resume=half_way, **settings)))
    assert_same_checkpoint(*(list_checkpoints(inputs / "runs" / name)[-1] for name in (whole, again)))


def test_too_many_in_a_row_stop_the_run_at_good_weights(inputs, poisoned, capfd):
    settings = {"max_steps": 30, "save_every": 2, "log_every": 2, "validate_every": 0, "max_skipped_steps": 4}
    poisoned |= {1, 2, 3, *range(7, 30)}
    with pytest.raises(SystemExit) as end:
        run_command(TrainConfig, fit, flags(inputs, name="stopped", **settings))
    assert end.value.code == 1
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("error: training diverged: by step 12, the gradients of 5 steps one after another were not")
    run = inputs / "runs" / "stopped"
    last = list_checkpoints(run)[-1]
    assert last.name == "step_00000010"
    for weights in ("model", "ema"):
        assert all(param.isfinite().all() for param in load_model(last, weights).parameters())
    poisoned.clear()  # as if the data were better or the learning rate lower
    fit(parse(TrainConfig, flags(inputs, name="stopped", resume="auto", **settings | {"max_steps": 14})))
    record = read_records(run / "metrics.jsonl")[-2]
    assert record["train/skipped_steps"] == 6
    assert "train/loss" in record


def test_without_a_limit_reached_the_run_goes_on(inputs, poisoned):
    poisoned |= set(range(2, 11))  # nine in a row; the default limit is ten
    fit(parse(TrainConfig, flags(inputs, name="goes-on", max_steps=14, validate_every=0)))
    assert read_records(inputs / "runs" / "goes-on" / "metrics.jsonl")[-1]["step"] == 14
