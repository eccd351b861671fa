"""Loss sums, the training record computed from them, and throughput."""

import math

import pytest
import torch

from gptbert.config import ModelConfig, TrainConfig
from gptbert.data.hybrid_plan import HybridPlan
from gptbert.distributed.world import World
from gptbert.model.objective import Objective
from gptbert.monitoring import training_record
from gptbert.monitoring.metrics import LossSums, Throughput, perplexity, training_losses
from gptbert.monitoring.training_record import TrainingRecord
from kernels import MaskedCrossEntropy
from tests.runs import MODEL

CPU = torch.device("cpu")

ALONE = World(0, 1, torch.device("cpu"))


def result(mlm=(0.0, 0.0, 0, 0), clm=(0.0, 0.0, 0, 0)):
    """Loss, z-loss, correct and count of each objective."""
    loss, z_loss, correct, count = (torch.tensor(pair) for pair in zip(mlm, clm, strict=True))
    return MaskedCrossEntropy((loss + z_loss).sum(), loss, z_loss, correct, count)


def test_means_are_over_labels_not_over_calls():
    sums = LossSums(ALONE.device)
    sums.add(result(mlm=(2.0, 8.0, 1, 1)))
    sums.add(result(mlm=(3.0, 4.0, 0, 3), clm=(70.0, 0.0, 5, 10)))
    means = sums.means(ALONE)
    expected = {"loss": 1.25, "perplexity": math.exp(1.25), "accuracy": 0.25, "z_loss": 3.0, "count": 4}
    assert means[Objective.MLM] == pytest.approx(expected)
    assert means[Objective.CLM]["loss"] == 7.0
    assert sums.means(ALONE) == means  # reading changes nothing


def test_an_objective_without_labels_has_no_means():
    sums = LossSums(ALONE.device)
    assert sums.means(ALONE) == {}
    sums.add(result())
    sums.add(result(mlm=(1.0, 1.0, 0, 2)))
    assert set(sums.means(ALONE)) == {Objective.MLM}


def test_many_small_losses_are_not_lost_beside_a_large_sum():
    sums = LossSums(ALONE.device)
    sums.add(result(clm=(2.0**24, 0.0, 0, 2**24)))
    for _ in range(10):
        sums.add(result(clm=(0.25, 0.0, 0, 0)))  # fp32 would round each of them away
    assert sums.means(ALONE)[Objective.CLM]["loss"] * 2**24 == 2**24 + 2.5


@pytest.mark.parametrize(
    ("loss", "expected"),
    [(0.0, 1.0), (1.0, math.e), (699.0, math.exp(699)), (710.0, math.inf), (1e30, math.inf), (math.inf, math.inf)],
)
def test_perplexity_overflows_to_infinity(loss, expected):
    assert perplexity(loss) == expected


def test_perplexity_of_no_number_is_no_number():
    assert math.isnan(perplexity(math.nan))


def test_the_loss_of_a_record_is_weighted_by_objective():
    means = {
        Objective.MLM: {"loss": 2.0, "perplexity": math.exp(2), "accuracy": 0.5, "z_loss": 4.0, "count": 1},
        Objective.CLM: {"loss": 6.0, "perplexity": math.exp(6), "accuracy": 0.1, "z_loss": 8.0, "count": 9},
    }
    record = training_losses(means, {Objective.MLM: 1, Objective.CLM: 3})
    total = {name: record[f"train/{name}"] for name in ("loss", "perplexity", "accuracy", "z_loss")}
    assert total == pytest.approx({"loss": 5.0, "perplexity": math.exp(5), "accuracy": 0.2, "z_loss": 7.0})
    for objective, values in means.items():
        for name in total:
            assert record[f"train/{objective.value}/{name}"] == values[name]
    assert len(record) == 12
    assert training_losses({}, {}) == {}
    only = training_losses({Objective.MLM: means[Objective.MLM]}, {Objective.MLM: 0})
    assert only == {name: value for name, value in record.items() if name.startswith("train/mlm/")}


def test_a_resumed_runs_first_record_has_its_own_share_of_labels(monkeypatch, tmp_path):
    """Its losses are of all labels since the last record, its speed is of the tokens since the resume."""
    shares = []
    monkeypatch.setattr(training_record, "measure_matmul_flops", lambda *_, **__: 1.0)
    monkeypatch.setattr(training_record, "training_flops", lambda _, length, share: shares.append(share) or 1.0)
    files = dict.fromkeys(("train_path", "valid_path", "config_file", "tokenizer_path"), tmp_path)
    config = TrainConfig(**files, max_steps=10, seq_length=8, global_batch_size=2, batch_reduction=1)
    sums, plan = LossSums(ALONE.device), HybridPlan(config, 1)
    record = TrainingRecord(config, ModelConfig(**MODEL), plan, ALONE)
    sums.add(result(clm=(0.0, 0.0, 0, plan.tokens_before(9))))
    resumed = LossSums(ALONE.device)
    resumed.load_rank_states([sums.state_dict()], ALONE)
    resumed.add(result(clm=(0.0, 0.0, 0, 8)))
    means = resumed.means(ALONE)
    labels = resumed.new_labels(means)
    assert labels == {Objective.CLM: 8}
    record(10, means, sum(labels.values()), torch.tensor(1.0), Throughput(plan.tokens_before(9)))
    resumed.reset()
    assert resumed.labels_before == [0, 0]
    assert shares == [0.5]


def test_throughput_leaves_pauses_out_and_knows_what_was_waiting(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    throughput = Throughput(1000)
    now[0] += 2
    with throughput.paused():
        now[0] += 50
    now[0] += 3
    with throughput.waiting():
        now[0] += 5
    assert throughput.since_last(2000) == (100, 0.5)
    now[0] += 1
    assert throughput.since_last(2007) == (7, 0)


def test_sums_go_on_on_the_rank_that_had_them_or_all_together_on_the_first():
    states = []
    for rank in range(2):
        sums = LossSums(CPU)
        sums.sums += rank + 1
        states.append(sums.state_dict())
    for world_size, expected in ((2, [1, 2]), (3, [3, 0, 0]), (1, [3])):
        loaded = [LossSums(CPU) for _ in range(world_size)]
        for rank, each in enumerate(loaded):
            each.load_rank_states(states, World(rank, world_size, CPU))
        assert [each.sums.unique().tolist() for each in loaded] == [[value] for value in expected]
