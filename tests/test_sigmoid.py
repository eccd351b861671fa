"""Fits of a sigmoid against known curves."""

import numpy as np
import pytest

from gptbert.scoring.sigmoid import fit, place, sigmoid

SEEN = np.log10(1 + 1e6 * np.array([*range(1, 10), *range(10, 101, 10)]))
AGES = np.arange(16.0, 31)
LOW, HIGH = [0, 0, 16, -0.5], [2, 1, 30, 0.5]


def learning_curve(rng, noise):
    """Negative surprisals of a word in three contexts."""
    true = (rng.uniform(3, 9), rng.uniform(1, 6), rng.uniform(6.3, 7.7), -14)
    x = np.repeat(SEEN, 3)
    return x, sigmoid(x, *true) + noise * rng.normal(size=len(x)), true


def start(x, y):
    return [np.ptp(y), 1.0, x.mean(), y.min()]


def test_exact_curves_are_found():
    rng = np.random.default_rng(1)
    for _ in range(10):
        x, y, true = learning_curve(rng, 0)
        np.testing.assert_allclose(fit(x, y, start(x, y)), true, rtol=1e-4)
        inside = (rng.uniform(0.7, 1.2), rng.uniform(0.3, 0.9), rng.uniform(18, 26), rng.uniform(-0.1, 0.2))
        found = fit(AGES, sigmoid(AGES, *inside), [1, 0.1, 23, 0], (LOW, HIGH))
        np.testing.assert_allclose(found, inside, atol=1e-4)


def test_no_fit_beats_it_nearby():
    rng = np.random.default_rng(2)
    x, y, _ = learning_curve(rng, 0.5)
    found = fit(x, y, start(x, y))
    least = np.sum((sigmoid(x, *found) - y) ** 2)
    shares = np.clip(sigmoid(AGES, 1, 2, 25, 0), 0, 1)  # steeper than the bound allows
    within = fit(AGES, shares, [1, 0.1, 23, 0], (LOW, HIGH))
    assert within[1] == pytest.approx(1)
    least_within = np.sum((sigmoid(AGES, *within) - shares) ** 2)
    for step in 1e-3 * rng.normal(size=(200, 4)):
        assert np.sum((sigmoid(x, *found + step) - y) ** 2) >= least
        other = np.clip(within + step, LOW, HIGH)
        assert np.sum((sigmoid(AGES, *other) - shares) ** 2) >= least_within - 1e-6


def test_what_has_no_fit_is_none():
    x = np.arange(5.0)
    assert fit(x[:3], x[:3], [1, 1, 1, 1]) is None
    assert fit(x, x, [4, 1, 2, 0]) is None  # a line: the parameters grow without end


def test_the_place_of_a_height():
    assert place((2, 1, 5, -1), 0) == pytest.approx(5)
    assert sigmoid(np.array(place((2, 0.7, 5, -1), 0.4)), 2, 0.7, 5, -1) == pytest.approx(0.4)
    assert [place(each, 0.5) for each in ((-1, 1, 0, 1), (1, -1, 0, 0), (1, 1, 0, 0.6), (0.4, 1, 0, 0))] == [None] * 4
