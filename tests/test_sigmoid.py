"""Fits of a sigmoid against known curves, and against scipy's where it is installed."""

import warnings

import numpy as np
import pytest

from gptbert.scoring.sigmoid import fit, fit_within, place, sigmoid

SEEN = np.log10(1 + 1e6 * np.array([*range(1, 10), *range(10, 101, 10)]))
AGES = np.arange(16.0, 31)
LOW, HIGH = [0, 0, 16, -0.5], [2, 1, 30, 0.5]


def learning_curve(rng, noise):
    """Negative surprisals of a word in three contexts."""
    true = (rng.uniform(3, 9), rng.uniform(1, 6), rng.uniform(6.3, 7.7), -14)
    x = np.repeat(SEEN, 3)
    return x, sigmoid(x, true) + noise * rng.normal(size=len(x)), true


def start(x, y):
    return [np.ptp(y), 1.0, x.mean(), y.min()]


def test_exact_curves_are_found():
    rng = np.random.default_rng(1)
    for _ in range(10):
        x, y, true = learning_curve(rng, 0)
        np.testing.assert_allclose(fit(x, y, start(x, y)), true, rtol=1e-4)
        inside = (rng.uniform(0.7, 1.2), rng.uniform(0.3, 0.9), rng.uniform(18, 26), rng.uniform(-0.1, 0.2))
        found = fit_within(AGES, sigmoid(AGES, inside), [1, 0.1, 23, 0], LOW, HIGH)
        np.testing.assert_allclose(found, inside, atol=1e-4)


def test_no_fit_beats_it_nearby():
    rng = np.random.default_rng(2)
    x, y, _ = learning_curve(rng, 0.5)
    found = fit(x, y, start(x, y))
    least = np.sum((sigmoid(x, found) - y) ** 2)
    shares = np.clip(sigmoid(AGES, (1, 2, 25, 0)), 0, 1)  # steeper than the bound allows
    within = fit_within(AGES, shares, [1, 0.1, 23, 0], LOW, HIGH)
    assert within[1] == 1
    least_within = np.sum((sigmoid(AGES, within) - shares) ** 2)
    for step in 1e-3 * rng.normal(size=(200, 4)):
        assert np.sum((sigmoid(x, found + step) - y) ** 2) >= least
        other = np.clip(within + step, LOW, HIGH)
        assert np.sum((sigmoid(AGES, other) - shares) ** 2) >= least_within - 1e-12


def test_what_has_no_fit_is_none():
    x = np.arange(5.0)
    assert fit(x[:3], x[:3], [1, 1, 1, 1]) is None
    assert fit(x, np.array([0.0, 1, 2, 3, 4]), [4, 1, 2, 0], most_evaluations=12) is None


def test_the_place_of_a_height():
    assert place((2, 1, 5, -1), 0) == pytest.approx(5)
    assert sigmoid(np.array(place((2, 0.7, 5, -1), 0.4)), (2, 0.7, 5, -1)) == pytest.approx(0.4)
    assert [place(each, 0.5) for each in ((-1, 1, 0, 1), (1, -1, 0, 0), (1, 1, 0, 0.6), (0.4, 1, 0, 0))] == [None] * 4


def test_scipy_finds_the_same():
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(3)

    def theirs(x, y, first, **settings):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return optimize.curve_fit(lambda x, *each: sigmoid(x, each), x, y, p0=first, maxfev=1000, **settings)[0]
        except RuntimeError:
            return None

    for noise in (0, 0.1, 0.5, 1):
        for _ in range(5):
            x, y, _ = learning_curve(rng, noise)
            one, other = fit(x, y, start(x, y)), theirs(x, y, start(x, y))
            assert (one is None) == (other is None)
            if one is not None:
                np.testing.assert_allclose(sigmoid(SEEN, one), sigmoid(SEEN, other), atol=1e-4)
            shares = np.clip(sigmoid(AGES, (1, rng.uniform(0.2, 1.2), rng.uniform(17, 28), 0.05)), 0, 1)
            shares += 0.03 * noise * rng.normal(size=15)
            found = fit_within(AGES, shares, [1, 0.1, 23, 0], LOW, HIGH)
            expected = theirs(AGES, shares, [1, 0.1, 23, 0], bounds=(LOW, HIGH))
            np.testing.assert_allclose(sigmoid(AGES, found), sigmoid(AGES, expected), atol=2e-3)
