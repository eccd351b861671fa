"""Line charts over steps, as the coordinates of an SVG; `report.html.jinja` has the markup.

Coordinates are in units of a `WIDTH` × `HEIGHT` drawing, from its upper left corner.
"""

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

Point = tuple[float, float]

WIDTH, HEIGHT = 480, 280
LEFT, RIGHT, TOP, BOTTOM = 58, 454, 12, 248  # the plot area
MOST_POINTS = 1000  # per line
_MOST_BANDS = 60
_LARGEST = 1e100  # larger values are not drawn


@dataclass(frozen=True)
class Line:
    """A line to draw.

    Attributes:
        label: its name in the legend.
        style: its CSS classes.
        points: (step, value), steps ascending; non-finite values leave a gap.
        has_marks: draw a mark at each point.
    """

    label: str
    style: str
    points: list[Point]
    has_marks: bool = False


@dataclass(frozen=True)
class DrawnLine:
    """A line in the drawing: its path's `d` attribute, and the coordinates of its marks."""

    label: str
    style: str
    path: str
    marks: list[Point]


@dataclass(frozen=True)
class Chart:
    """A chart in drawing coordinates.

    Attributes:
        title: of the chart.
        lines: in the order of the legend.
        x_ticks: positions and labels.
        y_ticks: positions and labels.
        bands: left edges, widths and tooltips.
        missing: number of non-finite values.
    """

    title: str
    lines: list[DrawnLine]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    bands: list[tuple[float, float, str]]
    missing: int


def draw(title: str, lines: list[Line], *, from_zero: bool = False, log: bool = False) -> Chart | None:
    """Draw lines into one chart; None if they have no points.

    Args:
        title: of the chart.
        lines: those without points are omitted.
        from_zero: the vertical axis begins at 0.
        log: the vertical axis is logarithmic; values up to 0 leave gaps.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    is_drawn = (lambda value: 0 < value < _LARGEST) if log else (lambda value: abs(value) < _LARGEST)
    values = [value for line in lines for _, value in line.points if is_drawn(value)]
    steps = [step for line in lines for step, _ in line.points]
    x_low, x_high = _widened(min(steps), max(steps))
    y_low, y_high = _range(values, from_zero=from_zero, log=log)
    scaled = math.log10 if log else float
    y_ticks = log_ticks(y_low, y_high) if log else ticks(y_low, y_high, 5)
    if not log and all(value == int(value) for value in values):
        y_ticks = _whole(y_ticks)

    def x(step: float) -> float:
        return round(LEFT + (step - x_low) / (x_high - x_low) * (RIGHT - LEFT), 1)

    def y(value: float) -> float:
        return round(BOTTOM - (scaled(value) - scaled(y_low)) / (scaled(y_high) - scaled(y_low)) * (BOTTOM - TOP), 1)

    drawn = []
    for line in lines:
        pieces = _pieces(thin(line.points, is_drawn), is_drawn)
        placed = [[(x(step), y(value)) for step, value in piece] for piece in pieces]
        path = "".join("M" + "L".join(f"{left:g} {top:g}" for left, top in piece) for piece in placed)
        marks = [point for piece in placed if line.has_marks or len(piece) == 1 for point in piece]
        drawn.append(DrawnLine(line.label, line.style, path, marks))
    return Chart(
        title,
        drawn,
        [(x(tick), number(tick)) for tick in _whole(ticks(x_low, x_high, 5))],
        [(y(tick), number(tick)) for tick in y_ticks],
        [(x(left), x(right) - x(left), text) for left, right, text in _bands(lines, x_low, x_high)],
        sum(not math.isfinite(value) for line in lines for _, value in line.points),
    )


def thin(points: list[Point], is_drawn: Callable[[float], bool] = math.isfinite) -> list[Point]:
    """Reduce to at most `MOST_POINTS` points, which include the highest and lowest of every stretch of the line.

    Args:
        points: steps and values.
        is_drawn: whether a value is drawn; others are kept only if a stretch has nothing else.
    """
    if len(points) <= MOST_POINTS:
        return points
    stretches = MOST_POINTS // 2
    borders = [len(points) * i // stretches for i in range(stretches + 1)]
    kept = []
    for first, end in pairwise(borders):
        stretch = [point for point in points[first:end] if is_drawn(point[1])] or points[first : first + 1]
        extremes = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        kept += sorted(extremes)
    return kept


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from `low` to `high`, about `most` of them."""
    wanted = (high - low) / most
    magnitude = 10.0 ** math.floor(math.log10(wanted))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= wanted * 0.999)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from `low` to `high`, at most six; with their multiples by 2 and 5 if fewer than three."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    powers = [10.0**exponent for exponent in exponents if low <= 10.0**exponent <= high]
    if len(powers) > 2:
        return powers[:: -(-len(powers) // 6)]
    between = [factor * 10.0**exponent for exponent in exponents for factor in (1, 2, 5)]
    return [tick for tick in between if low <= tick <= high] or [low, high]


def number(value: float) -> str:
    """Format a number compactly."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size <= abs(value) < 1e12:
            return f"{value / (1e3 if letter == 'k' else size):.4g}{letter}"
    return f"{value:,.4g}".replace("e-0", "e-").replace("e+0", "e+").replace("e+", "e")


def _whole(numbers: list[float]) -> list[float]:
    return [number for number in numbers if number == int(number)]


def _range(values: list[float], *, from_zero: bool, log: bool) -> tuple[float, float]:
    if not values:
        return (1.0, 10.0) if log else (0.0, 1.0)
    low, high = min(values), max(values)
    if log:
        return low / 1.2, high * 1.2
    if from_zero:
        return min(low, 0.0), high * 1.05 if high > 0 else 1.0
    low, high = _widened(low, high)
    margin = 0.04 * (high - low)
    return low - margin, high + margin


def _widened(low: float, high: float) -> tuple[float, float]:
    """The range, widened if it is too narrow to divide by."""
    around = max(abs(low), abs(high))
    if high - low > 1e-6 * around:
        return low, high
    return low - 0.5 * around - 0.5 * (around == 0), high + 0.5 * around + 0.5 * (around == 0)


def _pieces(points: list[Point], is_drawn: Callable[[float], bool]) -> list[list[Point]]:
    """Split a line at its gaps."""
    pieces: list[list[Point]] = [[]]
    for point in points:
        if is_drawn(point[1]):
            pieces[-1].append(point)
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def _bands(lines: list[Line], low: float, high: float) -> list[tuple[float, float, str]]:
    """Split `low` to `high` into bands, each with the values at a step inside it."""
    steps = sorted({step for line in lines for step, _ in line.points})
    shown = [steps[len(steps) * i // _MOST_BANDS] for i in range(_MOST_BANDS)] if len(steps) > _MOST_BANDS else steps
    borders = [low, *((left + right) / 2 for left, right in pairwise(shown)), high]
    bands = []
    for step, (left, right) in zip(shown, pairwise(borders), strict=True):
        parts = [f"step {step:,}"]
        for line in lines:
            place = bisect_left(line.points, step, key=lambda point: point[0])
            near = [point for point in line.points[max(0, place - 1) : place + 1] if left <= point[0] <= right]
            parts += [f"{line.label}: {value:.5g}" for _, value in near[-1:]]
        bands.append((left, right, "\n".join(parts)))
    return bands
