"""Schedules: recorded learning rates, known values, and properties for arbitrary settings."""

import itertools
import json
import math
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gptbert.schedules import batch_size, is_due, learning_rate, learning_rate_factor, length_factor, mask_probability

GOLDEN = json.loads((Path(__file__).parent / "golden" / "lr_schedule.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", GOLDEN)
def test_recorded_learning_rates(name):
    shape = dict(pair.split("=") for pair in name.split(","))
    warmup, cooldown, steps = (int(shape[key]) for key in ("warmup", "cooldown", "steps"))
    for step, expected in GOLDEN[name].items():
        if int(step) == steps and cooldown == 0:
            continue  # past the end of the run
        assert learning_rate_factor(int(step), warmup, cooldown, steps) == pytest.approx(expected, rel=0, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 50), st.integers(0, 50), st.integers(1, 200))
def test_learning_rate_rises_then_falls_within_bounds(warmup, cooldown, steps):
    assume(warmup + cooldown <= steps)
    factors = [learning_rate_factor(step, warmup, cooldown, steps) for step in range(steps)]
    assert all(0 <= factor <= 1 for factor in factors)
    assert all(one < other for one, other in itertools.pairwise(factors[:warmup]))
    assert all(one >= other for one, other in itertools.pairwise(factors[warmup:]))
    if cooldown:
        assert factors[-1] == pytest.approx(0.1 / cooldown)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("trapezoid", [0, 0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]),
        ("constant", [0, 0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_other_schedules_stay_at_the_peak(schedule, expected):
    assert [learning_rate_factor(step, 2, 4, 10, schedule) for step in range(11)] == expected


@pytest.mark.parametrize("proportion", [(0.016, 0.016), (0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.3, 0.7)])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 40])
def test_every_step_of_any_run_has_a_learning_rate(make_config, proportion, steps):
    config = make_config(
        max_steps=steps, warmup_proportion=proportion[0], cooldown_proportion=proportion[1], learning_rate=2.0
    )
    rates = [learning_rate(config, step) for step in range(steps)]
    assert all(math.isfinite(rate) and 0 <= rate <= 2 for rate in rates)


def test_the_users_run_has_the_values_of_the_paper(make_config):
    config = make_config(max_steps=40_000)
    assert (config.warmup_steps, config.cooldown_steps) == (640, 640)
    assert learning_rate(config, 640) == 1e-3
    assert [mask_probability(config, step) for step in (0, 20_000, 40_000)] == pytest.approx([0.3, 0.225, 0.15])
    assert [batch_size(config, step) for step in (0, 20_000, 39_999)] == [32, 80, 128]


@pytest.mark.parametrize("steps", [10, 30, 70, 1000, 40_000])
def test_rows_grow_at_70_and_90_percent(make_config, steps):
    config = make_config(max_steps=steps, seq_length_growth=True, batch_reduction=1, global_batch_size=128)
    edges = (0, steps * 7 // 10 - 1, steps * 7 // 10, steps * 9 // 10 - 1, steps * 9 // 10, steps - 1)
    assert [length_factor(config, step) for step in edges] == [1, 1, 2, 2, 4, 4]
    assert [batch_size(config, step) for step in edges] == [128, 128, 64, 64, 32, 32]
    assert {length_factor(make_config(max_steps=steps), step) for step in range(0, steps, steps // 10)} == {1}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 300), st.integers(1, 500), st.floats(1, 1000), st.booleans())
def test_batches_grow_steadily_to_the_global_batch_size(make_config, steps, rows, reduction, growth):
    config = make_config(
        max_steps=steps, global_batch_size=rows, batch_reduction=reduction, seq_length_growth=growth, hybrid_numerator=0
    )
    sizes = [batch_size(config, step) for step in range(steps)]
    assert all(1 <= size <= rows for size in sizes)
    for factor in (1, 2, 4):
        within = [size for step, size in enumerate(sizes) if length_factor(config, step) == factor]
        assert within == sorted(within)
    assert abs(sizes[0] - rows / reduction) <= max(0.5, 1 - rows / reduction)
    if reduction == 1 and not growth:
        assert set(sizes) == {rows}


@settings(max_examples=40, deadline=None)
@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 100))
def test_mask_probability_is_linear_between_its_ends(make_config, start, end, steps):
    config = make_config(mask_p_start=start, mask_p_end=end, max_steps=steps)
    values = [mask_probability(config, step) for step in range(steps + 1)]
    assert values[0] == start
    assert values[-1] == pytest.approx(end, abs=1e-12)
    assert all(min(start, end) - 1e-12 <= value <= max(start, end) + 1e-12 for value in values)
    assert values[steps // 2] == pytest.approx(start + (end - start) * (steps // 2) / steps, abs=1e-12)


def test_what_happens_every_so_many_steps_also_happens_at_the_end():
    due = {every: [step for step in range(1, 8) if is_due(step, every, 7)] for every in (0, 1, 3, 10)}
    assert due == {0: [7], 1: [*range(1, 8)], 3: [3, 6, 7], 10: [7]}
