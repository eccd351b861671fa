"""The number of rows in a micro-batch, and its shapes."""

from pathlib import Path

import pytest
import torch

from gptbert.config import TrainConfig
from gptbert.data.hybrid_plan import HybridPlan
from gptbert.data.micro_batch import MicroBatches, micro_batch_rows
from gptbert.data.objectives import Batch, Objective
from gptbert.distributed.world import World
from kernels.padding import ROWS

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def config(local_batch_size, seq_length=128):
    return TrainConfig((Path("none"),), *(Path("none"),) * 3, local_batch_size=local_batch_size, seq_length=seq_length)


@pytest.mark.parametrize("device", [CPU, GPU])
def test_tokens_at_a_time_stay_the_same(device):
    assert [micro_batch_rows(config(8), length, device) for length in (128, 256, 512)] == [8, 4, 2]


def test_a_micro_batch_has_a_row_however_long_it_is():
    assert micro_batch_rows(config(1), 512, GPU) == 1
    assert micro_batch_rows(config(8, seq_length=4096), 16384, CPU) == 1


@pytest.mark.parametrize(("threads", "rows"), [(1, 16), (2, 16), (4, 32), (64, 256)])
def test_a_cpu_takes_what_its_threads_share_well(monkeypatch, threads, rows):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert micro_batch_rows(config(256), 128, CPU) == rows
    assert micro_batch_rows(config(256), 128, GPU) == 256


MLM, CLM = Objective.MLM, Objective.CLM


def fixed(make_config, rank=0, world_size=1, **changes):
    """Micro-batches with fixed shapes, and their plan."""
    config = make_config(max_steps=100, seq_length=16, **changes)
    plan = HybridPlan(config, world_size)
    return MicroBatches(config, plan, World(rank, world_size, GPU)), plan


@pytest.mark.parametrize(
    ("world_size", "changes", "rank", "composition"),
    [
        (1, {"global_batch_size": 32, "local_batch_size": 32}, 0, {MLM: 8, CLM: 24}),
        (1, {"global_batch_size": 32, "local_batch_size": 8}, 0, {MLM: 2, CLM: 6}),
        (1, {"global_batch_size": 32, "local_batch_size": 2}, 0, {MLM: 1, CLM: 1}),
        (1, {"global_batch_size": 32, "local_batch_size": 8, "hybrid_numerator": 0}, 0, {CLM: 8}),
        (4, {"global_batch_size": 128, "local_batch_size": 32}, 0, {MLM: 32}),
        (4, {"global_batch_size": 128, "local_batch_size": 32}, 3, {CLM: 32}),
        (4, {"global_batch_size": 128, "local_batch_size": 64, "hybrid_mode": "batch"}, 2, {MLM: 8, CLM: 24}),
    ],
)
def test_the_rows_of_each_objective_are_as_many_as_ever_and_fit(make_config, world_size, changes, rank, composition):
    micro_batches, plan = fixed(make_config, rank, world_size, **changes)
    needed = [
        max(-(-plan.rows_of_a_rank(objective, step) // composition[objective]) for objective in composition)
        for step in (0, 50, 99)
    ]
    for step, pieces in zip((0, 50, 99), needed, strict=True):
        assert micro_batches.padded_rows(step) == {key: rows * pieces for key, rows in composition.items()}


def batch(objective, rows, length=16):
    """Rows filled with their own index."""
    numbers = torch.arange(rows)[:, None].expand(rows, length)
    return Batch(objective, numbers, torch.zeros_like(numbers), numbers)


@pytest.mark.parametrize("step", [0, 60, 99])
def test_all_pieces_have_one_shape_and_every_row_is_in_one(make_config, step):
    micro_batches, _ = fixed(make_config, global_batch_size=32, local_batch_size=8)
    rows = micro_batches.padded_rows(step)
    pieces = micro_batches.cut([batch(objective, count) for objective, count in rows.items()], step)
    assert {tuple((part.objective, len(part.labels)) for part in parts) for parts in pieces} == {((MLM, 2), (CLM, 6))}
    for objective, count in rows.items():
        seen = [part.labels[:, 0] for parts in pieces for part in parts if part.objective is objective]
        assert torch.cat(seen).tolist() == list(range(count))


def test_room_for_labels_does_not_depend_on_the_step_and_is_enough(make_config):
    micro_batches, _ = fixed(make_config, global_batch_size=8, mask_p_start=0.15, mask_p_end=0.3)
    assert micro_batches.label_capacity(batch(CLM, 3)) == 3 * 16
    capacity = micro_batches.label_capacity(batch(MLM, 30, 100))
    assert 0 <= capacity - 30 * (int(101 * 0.3) + 3) < ROWS
    assert capacity % ROWS == 0
    assert micro_batches.label_capacity(batch(MLM, 3, 4)) == 3 * 4


def test_all_ranks_have_as_many_pieces(make_config):
    """With FSDP, every forward is a collective, so ranks need equal numbers of micro-batches."""
    for mode in ("rank", "batch"):
        for step in (0, 30, 99):
            counts = set()
            for rank in range(4):
                changes = {"global_batch_size": 51, "local_batch_size": 4, "hybrid_mode": mode}
                micro_batches, _ = fixed(make_config, rank, 4, **changes)
                rows = micro_batches.padded_rows(step)
                batches = [batch(objective, count) for objective, count in rows.items()]
                counts.add(len(micro_batches.cut(batches, step)))
            assert len(counts) == 1


def test_where_one_row_fits_it_is_of_one_objective_or_the_other(make_config):
    micro_batches, _ = fixed(make_config, global_batch_size=6, local_batch_size=1)
    assert micro_batches.padded_rows(99) == {}
    pieces = micro_batches.cut([batch(MLM, 2), batch(CLM, 4)], 99)
    assert [[part.objective for part in parts] for parts in pieces] == [[MLM]] * 2 + [[CLM]] * 4
