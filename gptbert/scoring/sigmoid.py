"""Least-squares fits of a / (1 + exp(−b (x − c))) + d by scipy, as in BabyLM's evaluation."""

import warnings
from collections.abc import Sequence

import numpy as np
from scipy.optimize import curve_fit

_MOST_EVALUATIONS = 1000  # of the curve, those for derivatives included


def sigmoid(x: np.ndarray, a: float, b: float, c: float, d: float) -> np.ndarray:
    """The curve at x."""
    with np.errstate(over="ignore"):
        return a / (1 + np.exp(-b * (x - c))) + d


def place(parameters: Sequence[float] | np.ndarray, height: float) -> float | None:
    """Where a rising curve reaches a height; None if it falls, or does not reach it."""
    a, b, c, d = parameters
    if not (a > 0 and b > 0 and d < height < a + d):
        return None
    return float(c - np.log(a / (height - d) - 1) / b)


def fit(
    x: np.ndarray,
    y: np.ndarray,
    start: Sequence[float],
    bounds: tuple[Sequence[float], Sequence[float]] | None = None,
) -> np.ndarray | None:
    """Parameters [4] of a fit; None if it does not converge, or has no bounds and fewer than 4 points.

    Args:
        x: [points].
        y: [points].
        start: the first parameters.
        bounds: lower and upper bounds, [4] each; None for none.
    """
    if bounds is None and len(x) < len(start):
        return None
    limits = (-np.inf, np.inf) if bounds is None else bounds
    try:
        with warnings.catch_warnings(action="ignore"):  # of the parameters' covariance
            return curve_fit(sigmoid, x, y, start, bounds=limits, maxfev=_MOST_EVALUATIONS)[0]
    except RuntimeError:
        return None
