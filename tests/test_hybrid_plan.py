"""The hybrid plan: every rank's rows in every step, without gaps or overlaps."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptbert.data.hybrid_plan import HybridPlan
from gptbert.errors import InputError
from gptbert.model.objective import Objective
from gptbert.schedules import batch_size, length_factor

MLM, CLM = Objective.MLM, Objective.CLM


@st.composite
def settings_of_a_run(draw):
    denominator = draw(st.integers(1, 6))
    mode = draw(st.sampled_from(["auto", "batch", "rank"]))
    world_size = denominator * draw(st.integers(1, 3)) if mode == "rank" else draw(st.integers(1, 9))
    return world_size, {
        "hybrid_numerator": draw(st.integers(0, denominator)),
        "hybrid_denominator": denominator,
        "hybrid_mode": mode,
        "global_batch_size": draw(st.integers(8, 90)),
        "batch_reduction": draw(st.sampled_from([1.0, 2.0, 4.0])),
        "seq_length_growth": draw(st.booleans()),
        "max_steps": draw(st.integers(1, 12)),
    }


@settings(max_examples=150, deadline=None)
@given(settings_of_a_run())
def test_the_ranks_shares_partition_every_step_without_gaps(make_config, run):
    world_size, changes = run
    config = make_config(**changes)
    plan = HybridPlan(config, world_size)
    next_slot = dict.fromkeys(Objective, 0)
    tokens = 0
    for step in range(config.max_steps):
        assert plan.tokens_before(step) == tokens
        factor = length_factor(config, step)
        shares = [share for rank in range(world_size) for share in plan.shares(step, rank)]
        assert all(share.num_rows > 0 and share.length_factor == factor for share in shares)
        for objective in Objective:
            for share in sorted((s for s in shares if s.objective is objective), key=lambda s: s.first_slot):
                assert share.first_slot == next_slot[objective]  # no slot twice, no slot skipped
                next_slot[objective] += share.num_rows * factor
            rows = sum(share.num_rows for share in shares if share.objective is objective)
            assert rows == plan.num_rows(objective, step)
        total = sum(share.num_rows for share in shares)
        assert total == batch_size(config, step)
        tokens += total * factor * config.seq_length
        ratio = Fraction(config.hybrid_numerator, config.hybrid_denominator)
        masked = plan.num_rows(MLM, step)
        assert abs(masked - total * ratio) <= max(Fraction(1, 2), 1 - total * ratio, 1 - total * (1 - ratio))
        assert (masked > 0) == (ratio > 0)
        assert (masked < total) == (ratio < 1)
    assert plan.tokens_before(config.max_steps) == tokens


@settings(max_examples=60, deadline=None)
@given(settings_of_a_run(), st.integers(1, 9))
def test_the_world_size_changes_no_total(make_config, run, other_size):
    world_size, changes = run
    config = make_config(**{**changes, "hybrid_mode": "auto"})
    one, other = HybridPlan(config, world_size), HybridPlan(config, other_size)

    def slots(plan, step):
        shares = [share for rank in range(plan.world_size) for share in plan.shares(step, rank)]
        return {(s.objective, s.first_slot + row * s.length_factor) for s in shares for row in range(s.num_rows)}

    for step in range(config.max_steps):
        assert slots(one, step) == slots(other, step)
    assert one.tokens_before(config.max_steps) == other.tokens_before(config.max_steps)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
def test_ranks_of_an_objective_have_equal_shares_give_or_take_a_row(make_config, world_size):
    plan = HybridPlan(make_config(hybrid_mode="batch", global_batch_size=61, max_steps=7), world_size)
    for step in range(7):
        for objective in Objective:
            counts = [
                sum(share.num_rows for share in plan.shares(step, rank) if share.objective is objective)
                for rank in range(world_size)
            ]
            assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize(
    ("numerator", "denominator", "world_size"),
    [(1, 4, 4), (1, 4, 8), (3, 4, 4), (1, 2, 6), (0, 4, 4), (4, 4, 4), (2, 3, 9)],
)
def test_rank_mode_gives_each_rank_one_objective(make_config, numerator, denominator, world_size):
    config = make_config(hybrid_numerator=numerator, hybrid_denominator=denominator, hybrid_mode="rank", max_steps=3)
    plan = HybridPlan(config, world_size)
    for rank in range(world_size):
        expected = MLM if rank * denominator < numerator * world_size else CLM
        assert {share.objective for share in plan.shares(1, rank)} == {expected}
        assert rank in plan.ranks(expected)
    assert len(plan.ranks(MLM)) + len(plan.ranks(CLM)) == world_size
    assert plan.weight(MLM) == numerator / denominator
    assert plan.weight(MLM) + plan.weight(CLM) == 1


@pytest.mark.parametrize(("world_size", "sizes"), [(3, "4, 8, 12"), (1, "4, 8, 12"), (6, "4, 8, 12")])
def test_rank_mode_names_the_sizes_that_work(make_config, world_size, sizes):
    with pytest.raises(InputError, match=f"--hybrid_mode rank .* {sizes}, .* not {world_size}; --hybrid_mode batch"):
        HybridPlan(make_config(hybrid_mode="rank", max_steps=1), world_size)


@pytest.mark.parametrize(("world_size", "mode"), [(1, "batch"), (2, "batch"), (4, "rank"), (6, "batch"), (8, "rank")])
def test_auto_mode_uses_ranks_where_they_fit(make_config, world_size, mode):
    plan = HybridPlan(make_config(max_steps=2), world_size)
    assert plan.mode == mode
    if mode == "batch":
        assert all(len(plan.shares(0, rank)) == 2 for rank in range(world_size))


def rows_of_a_step(config, step):
    """(MLM rows, CLM rows, length factor) of one step, computed directly in Python."""
    factor = 1
    if config.seq_length_growth and step >= 0.7 * config.max_steps:
        factor = 2 if step < 0.9 * config.max_steps else 4
    first, last = config.global_batch_size / config.batch_reduction, config.global_batch_size
    total = max(1, int((first + (last - first) * step / config.max_steps) / factor + 0.5))
    numerator, denominator = config.hybrid_numerator, config.hybrid_denominator
    if numerator in {0, denominator}:
        return (total, 0, factor) if numerator else (0, total, factor)
    masked = min(max(1, int(total * numerator / denominator + 0.5)), total - 1)
    return masked, total - masked, factor


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_step_is_what_a_loop_over_steps_gives(make_config, data):
    denominator = data.draw(st.integers(1, 9) | st.integers(2**60, 2**62) | st.just(10**25 + 7))
    reduction = data.draw(st.floats(1, 9))
    config = make_config(
        hybrid_numerator=data.draw(st.integers(0, denominator) | st.sampled_from([denominator // 3, denominator // 2])),
        hybrid_denominator=denominator,
        hybrid_mode="batch",
        global_batch_size=data.draw(st.integers(80, 300) | st.integers(80, 10**7 - 1)),
        batch_reduction=reduction,
        seq_length_growth=data.draw(st.booleans()),
        max_steps=data.draw(st.integers(1, 150)),
        seq_length=2,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gptbert.data.hybrid_plan._BLOCK", data.draw(st.integers(1, 40), label="block"))
        plan = HybridPlan(config, 1)
    slots = [0, 0]
    steps = [(step, *rows_of_a_step(config, step)) for step in range(config.max_steps)]
    expected = {}
    for step, masked, causal, factor in steps:
        expected[step] = ([masked, causal], factor, list(slots))
        slots[0] += masked * factor
        slots[1] += causal * factor
    assert plan.length_factors == {factor: step for step, *_, factor in reversed(steps)}
    assert plan.tokens_before(config.max_steps) == 2 * sum(slots)
    for step in data.draw(st.permutations(range(config.max_steps))):
        rows, factor, first_slots = expected[step]
        assert [plan.num_rows(objective, step) for objective in Objective] == rows
        assert plan.tokens_before(step) == 2 * sum(first_slots)
        shares = {share.objective: share for share in plan.shares(step, 0)}
        assert {share.length_factor for share in shares.values()} == {factor}
        for objective, count, slot in zip(Objective, rows, first_slots, strict=True):
            if count:
                assert (shares[objective].num_rows, shares[objective].first_slot) == (count, slot)


def test_a_plan_does_not_grow_with_its_run(make_config):
    def held(steps):
        plan = HybridPlan(make_config(max_steps=steps, seq_length_growth=True), 8)
        blocks = [vars(plan._block(block)).values() for block in (0, steps // 2 // plan._block_steps)]
        assert all(array.base is None for array in [plan._block_slots, *blocks[0], *blocks[1]]), (
            "no parts of larger ones"
        )
        return plan._block_slots.nbytes, sum(array.nbytes for block in blocks for array in block)

    assert held(10**6)[0] < 66_000
    assert held(10**6)[1] < 2 * 4100 * 40
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gptbert.data.hybrid_plan._BLOCK", 2**6)
        slots, blocks = held(2**12)
        assert held(2**16) == (slots, pytest.approx(16 * blocks, rel=0.01)), "longer blocks, not more of them"


def test_a_step_of_one_row_cannot_be_a_hybrid(make_config):
    small = {"global_batch_size": 4, "max_steps": 5}
    with pytest.raises(InputError, match=r"--global_batch_size 4 .*step 0 only one row"):
        HybridPlan(make_config(**small), 1)
    late = make_config(global_batch_size=5, batch_reduction=1, max_steps=9000, seq_length_growth=True)
    with pytest.raises(InputError, match=r"^--global_batch_size 5 gives step 8100 only one row \(see .*at least two$"):
        HybridPlan(late, 1)
    for numerator in (0, 4):
        HybridPlan(make_config(hybrid_numerator=numerator, **small), 1)
    HybridPlan(make_config(batch_reduction=2, **small), 1)


@pytest.mark.parametrize(("numerator", "masked"), [(1, 1), (63, 1)])
def test_the_smallest_hybrid_step_has_a_row_of_each(make_config, numerator, masked):
    config = make_config(
        hybrid_numerator=numerator, hybrid_denominator=64, global_batch_size=2, batch_reduction=1, max_steps=1
    )
    plan = HybridPlan(config, 1)
    assert [plan.num_rows(objective, 0) for objective in (MLM, CLM)] == [masked, 2 - masked]
