"""Correlations, NaN where they are not defined."""

from collections.abc import Sequence

import numpy as np


def pearson(one: Sequence[float] | np.ndarray, other: Sequence[float] | np.ndarray) -> float:
    """The correlation of two sequences; NaN for fewer than two pairs, or if one of them is constant."""
    x, y = (np.array(values, np.float64) for values in (one, other))
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return np.nan
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """The correlation of the ranks; equal values have the mean of theirs."""
    return pearson(_ranks(one), _ranks(other))


def _ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks from 1."""
    _, inverse, counts = np.unique(np.array(values, np.float64), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
