"""Bars for an H100, and whether they hold."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

Parts = dict[str, dict[str, Any]]  # of a report, by name


@dataclass(frozen=True)
class Bar:
    """A bound on one figure.

    Attributes:
        name: the figure's, with its unit.
        figure: looks it up in a report's parts; None if not measured.
        limit: the bound.
        is_least: whether the limit is a minimum; else a maximum.
        goal: a target beyond the bar, or None.
        published: the figure of the published code, run eagerly on an H100, or None.
    """

    name: str
    figure: Callable[[Parts], float | None]
    limit: float
    is_least: bool = False
    goal: float | None = None
    published: float | None = None

    def verdict(self, parts: Parts) -> dict[str, Any]:
        """The bar and the figure, for JSON; `held` is None if not measured."""
        found = self.figure(parts)
        held = None
        if found is not None:
            held = found >= self.limit if self.is_least else found <= self.limit
        return {
            "name": self.name, "limit": self.limit, "is_least": self.is_least, "goal": self.goal,
            "published": self.published, "found": found, "held": held,
        }  # fmt: skip


def look_up(parts: Parts, name: str, *keys: str) -> Any:
    """A value inside a part's result, or None if it does not exist."""
    found = parts.get(name, {}).get("result", {})
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _of(name: str, *keys: str) -> Callable[[Parts], float | None]:
    return lambda parts: look_up(parts, name, *keys)


def _tokens(case: str, limit: float, goal: float, published: float | None) -> Bar:
    figure = _of(f"steps {case}", "ours", "tokens_per_second")
    return Bar(f"{case}, tokens/s", figure, limit, is_least=True, goal=goal, published=published)


def _cross_entropy(shape: str) -> Iterator[Bar]:
    operation = f"masked_cross_entropy {shape}"

    def ours(parts: Parts, key: str) -> float | None:
        """As the trainer calls it; the first reports have only the call with an ordinary weight."""
        called = "triton_packed" if look_up(parts, "operations", "rows", operation, "triton_packed") else "triton"
        return look_up(parts, "operations", "rows", operation, called, key)

    def over_eager(parts: Parts, key: str) -> float | None:
        figure, eager = ours(parts, key), look_up(parts, "operations", "rows", operation, "eager", key)
        return figure / eager if figure is not None and eager else None

    yield Bar(f"{operation}: time over eager PyTorch's", partial(over_eager, key="ms"), 1.0)
    yield Bar(f"{operation}: memory over eager PyTorch's", partial(over_eager, key="peak_mb"), 0.1)
    yield Bar(f"{operation}: launches", partial(ours, key="launches"), 12)


BARS = (
    _tokens("base_32k hybrid 32 × 128", 250_000, 370_000, 38_600),
    _tokens("base_32k hybrid 256 × 128", 380_000, 480_000, 96_600),
    _tokens("base MLM 64 × 512", 330_000, 460_000, 57_700),
    _tokens("small MLM 256 × 128", 1_000_000, 1_240_000, 199_000),
    _tokens("small hybrid 32 × 128", 550_000, 870_000, None),
    Bar("check of the kernels: comparisons out of their bounds", _of("check", "failed"), 0),
    Bar("check before a run, cold, s", _of("check before a run", "cold_seconds"), 5.0),
    Bar("check before a run, warm, s", _of("check before a run", "warm_seconds"), 1.0),
    *_cross_entropy("N=4096 D=768 V=32768"),
    *_cross_entropy("N=32768 D=384 V=8192"),
    Bar(
        "LAMB, clipping and average, small: host ms",
        _of("operations", "rows", "lamb small", "optimizer", "host_ms"),
        0.3,
    ),
    Bar("resume, compiled: tensors that differ", _of("resume, compiled", "differing"), 0),
    Bar("resume, not compiled: tensors that differ", _of("resume, not compiled", "differing"), 0),
    Bar("tests that failed", _of("tests", "failed"), 0),
)


def verdicts(parts: Parts) -> list[dict[str, Any]]:
    """All bars, applied to a report's parts."""
    return [bar.verdict(parts) for bar in BARS]
