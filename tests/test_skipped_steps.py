"""Counts of steps with non-finite gradients."""

import math
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptbert.errors import InputError
from gptbert.monitoring.skipped_steps import SkippedSteps

NORMS = st.sampled_from([1.0, 0.0, math.inf, math.nan])


@given(st.lists(st.tuples(NORMS, st.booleans()), max_size=40))
def test_counts_are_those_of_the_list(steps):
    """Each step has a norm, and may be followed by a record."""
    skipped = SkippedSteps(torch.device("cpu"))
    streak = longest = total = 0
    for norm, is_recorded in steps:
        is_taken = skipped.add(torch.tensor(norm))
        assert is_taken.item() == math.isfinite(norm)
        streak = 0 if is_taken else streak + 1
        longest, total = max(longest, streak), total + (not is_taken)
        if is_recorded:
            assert skipped.take_longest_streak() == longest
            longest = streak
    assert skipped.counts.tolist() == [total, streak, longest]
    assert skipped.total() == total


def test_counts_go_on_from_saved_ones():
    one, other = (SkippedSteps(torch.device("cpu")) for _ in range(2))
    for norm in (math.nan, math.nan):
        one.add(torch.tensor(norm))
    other.counts.copy_(one.counts)
    other.add(torch.tensor(math.inf))
    assert other.take_longest_streak() == 3


def test_as_many_in_a_row_as_the_limit_end_the_run():
    for most, is_ended in ((2, True), (3, True), (4, False)):
        skipped = SkippedSteps(torch.device("cpu"))
        for _ in range(3):
            skipped.add(torch.tensor(math.nan))
        with pytest.raises(InputError, match="of 3 steps one after another") if is_ended else nullcontext():
            skipped.raise_if_too_many(most, 3)
