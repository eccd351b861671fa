"""The number of rows in a micro-batch, and its shapes."""

from pathlib import Path

import pytest
import torch

from gptbert.config import TrainConfig
from gptbert.data.hybrid_plan import HybridPlan
from gptbert.data.micro_batch import MicroBatches, micro_batch_rows
from gptbert.distributed.world import World
from gptbert.model.batch import Batch
from gptbert.model.objective import Objective
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


def batch(masked, causal, length=16):
    """Rows filled with their own index."""
    numbers = torch.arange(masked + causal)[:, None].expand(-1, length)
    return Batch(numbers, torch.zeros_like(numbers), numbers, num_masked=masked)


@pytest.mark.parametrize("step", [0, 60, 99])
def test_all_pieces_have_one_shape_and_every_row_is_in_one(make_config, step):
    micro_batches, _ = fixed(make_config, global_batch_size=32, local_batch_size=8)
    rows = micro_batches.padded_rows(step)
    pieces = micro_batches.cut(batch(*(rows[objective] for objective in Objective)), step)
    assert {(piece.num_masked, len(piece) - piece.num_masked, piece.most_labels) for piece in pieces} == {(2, 6, 128)}
    seen = torch.cat([piece.labels[:, 0] for piece in pieces])
    assert sorted(seen.tolist()) == list(range(rows[MLM] + rows[CLM]))


def test_room_for_labels_does_not_depend_on_the_step_and_is_enough(make_config):
    micro_batches, _ = fixed(make_config, global_batch_size=64, local_batch_size=64, mask_p_start=0.15, mask_p_end=0.3)

    def room(masked, causal, length):
        seen = {micro_batches.cut(batch(masked, causal, length), step)[0].most_labels for step in (0, 99)}
        return seen.pop() if len(seen) == 1 else seen

    assert room(0, 3, 16) == 3 * 16
    capacity = room(30, 0, 100)
    assert 0 <= capacity - 30 * (int(101 * 0.3) + 3) < ROWS
    assert capacity % ROWS == 0
    assert room(30, 2, 100) == capacity + 2 * 100
    assert room(3, 0, 4) == 3 * 4
    micro_batches.has_fixed_shapes = False
    assert room(30, 2, 100) is None, "counted"


def test_all_ranks_have_as_many_pieces(make_config):
    """With FSDP, every forward is a collective, so ranks need equal numbers of micro-batches."""
    for mode in ("rank", "batch"):
        for step in (0, 30, 99):
            counts = set()
            for rank in range(4):
                changes = {"global_batch_size": 51, "local_batch_size": 4, "hybrid_mode": mode}
                micro_batches, _ = fixed(make_config, rank, 4, **changes)
                rows = micro_batches.padded_rows(step)
                counts.add(len(micro_batches.cut(batch(rows.get(MLM, 0), rows.get(CLM, 0)), step)))
            assert len(counts) == 1


def test_where_one_row_fits_it_is_of_one_objective_or_the_other(make_config):
    micro_batches, _ = fixed(make_config, global_batch_size=6, local_batch_size=1)
    assert micro_batches.padded_rows(99) == {}
    pieces = micro_batches.cut(batch(2, 4), 99)
    assert [(piece.num_masked, len(piece)) for piece in pieces] == [(1, 1)] * 2 + [(0, 1)] * 4
