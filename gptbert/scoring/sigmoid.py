"""Least-squares fits of a / (1 + exp(−b (x − c))) + d, free or with bounds.

BabyLM's evaluation fits with scipy's `curve_fit`, and leaves out what does not converge there. The free fit therefore
takes the same path: Moré's Levenberg-Marquardt method (1978, "The Levenberg-Marquardt algorithm: implementation and
theory"), which is MINPACK's, with `curve_fit`'s tolerances. The fit with bounds is a Levenberg-Marquardt method on the
parameters that are not held at a bound; it ends where scipy's ends, on another path.
"""

from collections.abc import Callable, Sequence

import numpy as np

_TOLERANCE = 1.49012e-8  # curve_fit's, of the relative change of the sum of squares and of the parameters
_FACTOR = 100.0  # first trust region, in sizes of the first parameters
_EPSILON = np.finfo(np.float64).eps

_Residuals = Callable[[np.ndarray], np.ndarray]


def sigmoid(x: np.ndarray, parameters: Sequence[float]) -> np.ndarray:
    """The curve at x, for parameters a, b, c, d."""
    a, b, c, d = parameters
    with np.errstate(all="ignore"):
        return a / (1 + np.exp(-b * (x - c))) + d


def place(parameters: Sequence[float], height: float) -> float | None:
    """Where a rising curve reaches a height; None if it falls, or does not reach it."""
    a, b, c, d = parameters
    if not (a > 0 and b > 0 and d < height < a + d):
        return None
    return float(c - np.log(a / (height - d) - 1) / b)


def fit(x: np.ndarray, y: np.ndarray, start: Sequence[float], most_evaluations: int = 1000) -> np.ndarray | None:
    """Parameters [4] of the fit without bounds; None if it does not converge, or there are fewer than 4 points.

    Args:
        x: [points].
        y: [points].
        start: the first parameters.
        most_evaluations: of the curve, those for derivatives included.
    """
    if len(x) < len(start):
        return None
    with np.errstate(all="ignore"):
        try:
            return _levenberg_marquardt(
                lambda parameters: sigmoid(x, parameters) - y, np.array(start, np.float64), most_evaluations
            )
        except np.linalg.LinAlgError:
            return None


def _levenberg_marquardt(residuals: _Residuals, parameters: np.ndarray, most_evaluations: int) -> np.ndarray | None:
    values = residuals(parameters)
    evaluations, damping, scale, radius = 1, 0.0, np.zeros_like(parameters), None
    while True:
        jacobian = _forward_differences(residuals, parameters, values)  # [points, 4]
        evaluations += len(parameters)
        norm, column_norms = np.linalg.norm(values), np.linalg.norm(jacobian, axis=0)
        scale = np.maximum(scale, column_norms) if radius is not None else np.where(column_norms, column_norms, 1.0)
        if radius is None:
            radius = _FACTOR * (np.linalg.norm(scale * parameters) or 1.0)
            is_first = True
        slopes = np.abs(jacobian.T @ values)[column_norms > 0] / column_norms[column_norms > 0]
        steepness = np.max(slopes, initial=0.0) / norm if norm else 0.0
        if steepness <= 0:
            return parameters
        accepted = False
        while not accepted:
            damping, step = _step(jacobian, values, scale, radius, damping)
            length = np.linalg.norm(scale * step)
            radius = min(radius, length) if is_first else radius
            is_first = False
            new = residuals(parameters + step)
            evaluations += 1
            new_norm = np.linalg.norm(new)
            reduction = 1 - (new_norm / norm) ** 2 if 0.1 * new_norm < norm else -1.0
            linear, damped = np.linalg.norm(jacobian @ step) / norm, np.sqrt(damping) * length / norm
            predicted, slope = linear**2 + 2 * damped**2, -(linear**2 + damped**2)
            ratio = reduction / predicted if predicted else 0.0
            if ratio <= 0.25:
                shrink = 0.5 if reduction >= 0 else 0.5 * slope / (slope + 0.5 * reduction)
                shrink = 0.1 if 0.1 * new_norm >= norm or shrink < 0.1 else shrink
                radius, damping = shrink * min(radius, length / 0.1), damping / shrink
            elif damping == 0 or ratio >= 0.75:
                radius, damping = length / 0.5, 0.5 * damping
            if accepted := ratio >= 1e-4:
                parameters, values, norm = parameters + step, new, new_norm
            size = np.linalg.norm(scale * parameters)
            if _is_small(reduction, predicted, ratio, _TOLERANCE) or radius <= _TOLERANCE * size:
                return parameters
            stuck = _is_small(reduction, predicted, ratio, _EPSILON) or radius <= _EPSILON * size
            if evaluations >= most_evaluations or stuck or steepness <= _EPSILON:
                return None


def _is_small(reduction: float, predicted: float, ratio: float, tolerance: float) -> bool:
    return abs(reduction) <= tolerance and predicted <= tolerance and 0.5 * ratio <= 1


def _forward_differences(residuals: _Residuals, parameters: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Derivatives [points, 4] of the residuals."""
    columns = []
    for index, parameter in enumerate(parameters):
        moved = parameters.copy()
        width = np.sqrt(_EPSILON) * (abs(parameter) or 1.0)
        moved[index] += width
        columns.append((residuals(moved) - values) / width)
    return np.stack(columns, axis=1)


def _step(
    jacobian: np.ndarray, values: np.ndarray, scale: np.ndarray, radius: float, damping: float
) -> tuple[float, np.ndarray]:
    """The damping whose step is as long as the trust region, to a tenth, and that step [4]; no damping if it fits.

    The step minimizes |J p + f|² + damping |D p|², by the singular values of J D⁻¹; the damping is found by Newton's
    method on 1/|D p|, kept between bounds (section 5 of the paper).
    """
    left, singular, right = np.linalg.svd(jacobian / scale, full_matrices=False)
    target = left.T @ values
    usable = singular > _EPSILON * max(jacobian.shape) * singular[0]

    def scaled(damping: float) -> np.ndarray:
        """D p in the singular vectors' coordinates."""
        if damping == 0:
            return np.divide(-target, singular, out=np.zeros_like(target), where=usable)
        return -singular * target / (singular**2 + damping)

    step = scaled(0.0)
    length = np.linalg.norm(step)
    excess = length - radius
    if excess <= 0.1 * radius:
        return 0.0, (right.T @ step) / scale

    def newton(step: np.ndarray, length: float, excess: float, damping: float) -> float:
        return excess / radius * length**2 / np.sum(step**2 / (singular**2 + damping))

    tiny = np.finfo(np.float64).tiny
    low = newton(step, length, excess, 0.0) if usable.all() else 0.0
    high = np.linalg.norm(singular * target) / radius or tiny / min(radius, 0.1)
    damping = min(max(damping, low), high) or np.linalg.norm(singular * target) / length
    for number in range(10):
        damping = damping or max(tiny, 1e-3 * high)
        step = scaled(damping)
        length = np.linalg.norm(step)
        before, excess = excess, length - radius
        if abs(excess) <= 0.1 * radius or (low == 0 and excess <= before < 0) or number == 9:
            break
        low, high = (max(low, damping), high) if excess > 0 else (low, min(high, damping))
        damping = max(low, damping + newton(step, length, excess, damping))
    return damping, (right.T @ step) / scale


def fit_within(
    x: np.ndarray, y: np.ndarray, start: Sequence[float], low: Sequence[float], high: Sequence[float]
) -> np.ndarray:
    """Parameters [4] of the fit with bounds.

    Args:
        x: [points].
        y: [points].
        start: the first parameters, within the bounds.
        low: [4] lower bounds.
        high: [4] upper bounds.
    """
    low, high = np.array(low, np.float64), np.array(high, np.float64)
    parameters, damping = np.clip(np.array(start, np.float64), low, high), 1e-3

    def residuals(parameters: np.ndarray) -> np.ndarray:
        return sigmoid(x, parameters) - y

    values = residuals(parameters)
    for _ in range(1000):
        jacobian = _forward_differences(residuals, parameters, values)
        gradient = jacobian.T @ values
        held = ((parameters <= low) & (gradient > 0)) | ((parameters >= high) & (gradient < 0))
        free = jacobian[:, ~held]
        if not free.size:
            return parameters
        normal = free.T @ free
        diagonal = np.diag(np.maximum(np.diag(normal), 1e-12))
        while damping < 1e12:
            step = np.zeros_like(parameters)
            step[~held] = np.linalg.solve(normal + damping * diagonal, -gradient[~held])
            new = np.clip(parameters + step, low, high)
            new_values = residuals(new)
            if new_values @ new_values < values @ values:
                break
            damping *= 4
        else:
            return parameters
        is_last = np.all(np.abs(new - parameters) <= 1e-10 * (1 + np.abs(parameters)))
        parameters, values, damping = new, new_values, max(damping / 10, 1e-12)
        if is_last:
            return parameters
    return parameters
