"""The number of rows in a micro-batch, and its shapes."""

from pathlib import Path

import pytest
import torch

from gptbert import schedules
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
        (1, {"local_batch_size": 8, "hybrid_numerator": 0, "hybrid_mode": "batch"}, 0, {CLM: 8}),
        (4, {"global_batch_size": 128, "local_batch_size": 32}, 0, {MLM: 32}),
        (4, {"global_batch_size": 128, "local_batch_size": 32}, 3, {CLM: 32}),
        (4, {"global_batch_size": 128, "local_batch_size": 64, "hybrid_mode": "batch"}, 2, {MLM: 8, CLM: 24}),
    ],
)
def test_rows_fit_and_are_filled_up_to_eighths_of_the_most(make_config, world_size, changes, rank, composition):
    micro_batches, plan = fixed(make_config, rank, world_size, **changes)
    shapes = set()
    for step in range(100):
        needed = {objective: plan.rows_of_a_rank(objective, step) for objective in composition}
        count = max(-(-rows // composition[objective]) for objective, rows in needed.items())
        padded = micro_batches.padded_rows(step)
        assert padded.keys() == composition.keys()
        shapes.add(tuple(rows // count for rows in padded.values()))
        for objective, rows in padded.items():
            assert rows % count == 0
            assert needed[objective] <= rows <= count * composition[objective]
        too_many = [padded[key] / count - needed[key] / count - composition[key] / 8 for key in composition]
        assert min(too_many) < 1, "one objective has less than an eighth to spare, and a row"
    assert max(shapes) == tuple(composition.values())
    assert len(shapes) <= 8


def batch(masked, causal, length=16):
    """Rows filled with their own index."""
    numbers = torch.arange(masked + causal)[:, None].expand(-1, length)
    return Batch(numbers, torch.zeros_like(numbers), numbers, num_masked=masked)


@pytest.mark.parametrize("has_fixed_shapes", [True, False])
@pytest.mark.parametrize(
    ("are_single", "changes"),
    [
        (True, {"global_batch_size": 32, "local_batch_size": 32}),
        (True, {"global_batch_size": 32, "local_batch_size": 32, "seq_length_growth": True}),
        (False, {"global_batch_size": 32, "local_batch_size": 31}),
        (False, {"global_batch_size": 32, "local_batch_size": 16, "batch_reduction": 4}),  # at its end
        (True, {"global_batch_size": 32, "local_batch_size": 32, "hybrid_numerator": 0}),
    ],
)
def test_a_run_knows_whether_each_step_is_one_micro_batch(make_config, are_single, changes, has_fixed_shapes):
    micro_batches, plan = fixed(make_config, **changes)
    micro_batches.has_fixed_shapes = has_fixed_shapes
    counts, lengths = set(), set()
    for step in range(100):
        rows = sum(plan.rows_of_a_rank(objective, step) for objective in Objective)
        rows = sum(micro_batches.padded_rows(step).values()) or rows
        length = plan.config.seq_length * schedules.length_factor(plan.config, step)
        ids = torch.zeros(rows, length, dtype=torch.long)
        counts.add(len(micro_batches.cut(Batch(ids, ids, ids, num_masked=0), step)))
        lengths.add(length)
    assert micro_batches.are_single is are_single is (counts == {1})
    assert set(micro_batches.lengths) == lengths


def test_a_step_takes_eighths_of_the_largest_micro_batch(make_config):
    micro_batches, plan = fixed(make_config, global_batch_size=32, local_batch_size=32, batch_reduction=4)
    rows = [{objective: plan.rows_of_a_rank(objective, step) for objective in Objective} for step in range(100)]
    assert micro_batches.padded_rows(rows.index({MLM: 5, CLM: 14})) == {MLM: 5, CLM: 15}


@pytest.mark.parametrize("step", [0, 60, 99])
def test_all_pieces_have_one_shape_and_every_row_is_in_one(make_config, step):
    micro_batches, _ = fixed(make_config, global_batch_size=32, local_batch_size=8)
    rows = micro_batches.padded_rows(step)
    pieces = micro_batches.cut(batch(*(rows[objective] for objective in Objective)), step)
    (shape,) = {piece.shape for piece in pieces}
    assert shape == (8, 16, 2, 128)
    seen = torch.cat([piece.labels[:, 0] for piece in pieces])
    assert sorted(seen.tolist()) == list(range(rows[MLM] + rows[CLM]))


@pytest.mark.parametrize("fractions", [(0.15, 0.3), (0.3, 0.15), (0.2, 0.2), (0.0, 0.0)])
def test_room_for_labels_is_enough_and_changes_a_few_times(make_config, fractions):
    masked = {"mask_p_start": fractions[0], "mask_p_end": fractions[1]}
    micro_batches, _ = fixed(make_config, global_batch_size=64, local_batch_size=64, **masked)

    def room(masked, causal, length, step):
        return micro_batches.cut(batch(masked, causal, length), step)[0].most_labels

    rooms = []
    for step in range(100):
        assert room(0, 3, 16, step) == 3 * 16
        rooms.append(room(30, 0, 100, step))
        share = fractions[0] + (fractions[1] - fractions[0]) * step / 100
        most = int(101 * share) + 3  # of a row: a span may go past the share
        assert 30 * most <= rooms[-1] < 30 * (most + 101 * max(fractions) / 8 + 1) + ROWS
        assert rooms[-1] % ROWS == 0
        assert room(30, 2, 100, step) == rooms[-1] + 2 * 100
        assert room(3, 0, 4, step) <= 3 * 4
    assert len(set(rooms)) <= 5
    micro_batches.has_fixed_shapes = False
    assert room(30, 2, 100, 0) is None, "counted"


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


@pytest.mark.parametrize(
    ("device", "cuda_graph", "is_fixed"),
    [(GPU, "off", True), (GPU, "auto", True), (CPU, "on", True), (CPU, "auto", False), (CPU, "off", False)],
)
def test_shapes_are_fixed_on_gpus_and_where_steps_are_recorded(make_config, device, cuda_graph, is_fixed):
    config = make_config(cuda_graph=cuda_graph)
    assert MicroBatches(config, HybridPlan(config, 1), World(0, 1, device)).has_fixed_shapes is is_fixed


@pytest.mark.parametrize(("parallel", "pieces"), [("fsdp", 2), ("ddp", 1)])
def test_padding_evens_out_ranks_only_where_forwards_are_collectives(make_config, parallel, pieces):
    """Of three rows, the first of two ranks has one."""
    settings = {"global_batch_size": 3, "local_batch_size": 1, "batch_reduction": 1, "hybrid_numerator": 0}
    config = make_config(parallel=parallel, hybrid_mode="batch", **settings)
    micro_batches = MicroBatches(config, HybridPlan(config, 2), World(0, 2, CPU))
    assert len(micro_batches.cut(batch(0, 1, config.seq_length), 0)) == pieces


def test_where_one_row_fits_it_is_of_one_objective_or_the_other(make_config):
    micro_batches, _ = fixed(make_config, global_batch_size=6, local_batch_size=1)
    assert micro_batches.padded_rows(99) == {}
    pieces = micro_batches.cut(batch(2, 4), 99)
    assert [(piece.num_masked, len(piece)) for piece in pieces] == [(1, 1)] * 2 + [(0, 1)] * 4
