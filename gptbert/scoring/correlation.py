"""Correlations, NaN where they are not defined."""

from collections.abc import Sequence

import numpy as np


def pearson(one: Sequence[float], other: Sequence[float]) -> float:
    """The correlation of two sequences; NaN for fewer than two pairs, or if one of them is constant."""
    one, other = (np.array(values, np.float64) for values in (one, other))
    if len(one) < 2 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return np.nan
    one, other = one - one.mean(), other - other.mean()
    return float(one @ other / np.sqrt((one @ one) * (other @ other)))


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """The correlation of the ranks; equal values have the mean of theirs."""
    return pearson(_ranks(one), _ranks(other))


def _ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks from 1."""
    _, inverse, counts = np.unique(np.array(values, np.float64), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]
