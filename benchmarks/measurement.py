"""Check correctness, then time in alternation with the reference; a session's results as rows of a CSV file.

Times on a shared machine are noisy, so every round times the eager PyTorch reference right before the implementation;
the reported ratio is the median over these pairs.
"""

import csv
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from benchmarks import machine
from gptbert.distributed.hardware import usable_cores
from kernels.numerics import Comparison

if TYPE_CHECKING:  # measuring does not need it
    from pytest_benchmark.fixture import BenchmarkFixture

BASELINE, COMPILED = "reference_eager", "reference_compiled"  # names of implementations
SECONDS = 2.0  # approximate total of one benchmark's rounds
MIN_ROUNDS, MAX_ROUNDS = 3, 50
WARM_UPS = {"cpu": 1, "cuda": 2}  # the first may compile; on a CPU the proof compiles, and rounds are long
PERCENTILES = (20, 50, 80)
KEY = ("op", "shape", "impl")
FIGURES = ("speed_over_reference_eager", "share_of_copy_bandwidth", "copy_gb_per_s", "peak_mib")
COLUMNS = (
    *("hardware", "device", "cores", "load_before", *machine.LIBRARIES, *KEY, "rounds"),
    *(f"p{percent}_ms" for percent in PERCENTILES),
    *FIGURES,
)

Row = dict[str, str]


class Results:
    """The results of a session, and what it attempted.

    Attributes:
        load: load average before the first benchmark, so of other processes.
        tried: values of KEY; a failed benchmark must not keep the row of an earlier session.
        rows: results.
    """

    def __init__(self) -> None:
        self.load = machine.load()
        self.tried: set[tuple[str, ...]] = set()
        self.rows: list[Row] = []

    def write(self, path: Path) -> None:
        """Replace attempted rows in a CSV file, and keep the others."""
        kept = []
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                kept = [row for row in csv.DictReader(file) if _key(row) not in self.tried]
        path.parent.mkdir(exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="", extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(sorted([*kept, *self.rows], key=_key))


def _key(row: Row) -> tuple[str, ...]:
    return tuple(row.get(name) or "" for name in KEY)


class Measurement:
    """One benchmark: `prove` (or `exempt`), then `time`.

    The test's name is the operation's; its parameters `impl` and `shape` are the implementation and the job.

    Attributes:
        enabled: whether to time; if not, everything runs once, and should be tiny.
    """

    def __init__(self, benchmark: "BenchmarkFixture", request: pytest.FixtureRequest, results: Results) -> None:
        self.enabled = not benchmark.disabled
        self._benchmark, self._results = benchmark, results
        parameters = request.node.callspec.params
        op, self._impl = request.node.originalname.removeprefix("test_"), parameters["impl"]
        self._key = (op, str(parameters["shape"]), self._impl)
        self._may_report = False
        benchmark.group = f"{op} {parameters['shape']}"

    def compiled(self, function: Callable) -> Callable:
        """The function, by `torch.compile` if the implementation's name says so; no code is generated if not timed."""
        if not self._impl.endswith("_compiled"):
            return function
        return torch.compile(function, backend="inductor" if self.enabled else "eager", fullgraph=True)

    def prove(self, comparisons: Iterable[Comparison]) -> None:
        """Allow the implementation to report, or fail with the first comparison beyond its bound."""
        self._try()
        results = []
        for result in comparisons:
            if not result.passed:
                pytest.fail(
                    f"{' '.join(self._key)}: {result.name}: error {result.error:.3e}, allowed {result.bound:.3e}; "
                    "no time is reported for wrong numbers",
                    pytrace=False,
                )
            results.append(result)
        self._may_report = bool(results)

    def exempt(self) -> None:
        """Allow a peer to report that computes something different by definition; the caller's comment says what."""
        self._try()
        self._may_report = True

    def time(self, run: Callable[[], object], reference: Callable[[], object], fewest_bytes: int | None = None) -> None:
        """Time `run`, alternating with `reference` if it is not the reference itself.

        Args:
            run: the implementation's work in one round.
            reference: the same work by the eager reference.
            fewest_bytes: minimum that the operation must move, for the fraction of copy bandwidth; None omits it.

        Raises:
            AssertionError: neither `prove` nor `exempt` was called.
        """
        assert self._may_report, f"{' '.join(self._key)}: nothing was compared with the reference before"
        is_reference = self._impl == BASELINE
        turns = [run] if is_reference else [reference, run]
        if not self.enabled:
            self._benchmark.pedantic(lambda: [action() for action in turns])
            return
        for _ in range(WARM_UPS[machine.device().type]):
            round_seconds = sum(machine.seconds(action) for action in turns)
        reference_times = []

        def turn_of_reference() -> None:
            if not is_reference:
                reference_times.append(machine.seconds(reference))

        def synchronized() -> None:
            run()
            machine.synchronize()

        with torch.compiler.set_stance("fail_on_recompile"):
            rounds = min(max(int(SECONDS / round_seconds), MIN_ROUNDS), MAX_ROUNDS)
            self._benchmark.pedantic(synchronized, setup=turn_of_reference, rounds=rounds)
        times = self._benchmark.stats.stats.data
        ratios = [before / after for before, after in zip(reference_times or times, times, strict=True)]
        figures = {"speed_over_reference_eager": statistics.median(ratios)}
        if fewest_bytes is not None:
            copy_rate = machine.copy_rate()
            figures["share_of_copy_bandwidth"] = fewest_bytes / statistics.median(times) / copy_rate
            figures["copy_gb_per_s"] = copy_rate / 1e9
        if machine.device().type == "cuda":
            figures["peak_mib"] = peak_bytes(run) / 2**20
        self._benchmark.extra_info.update(figures)
        self._results.rows.append(self._row(times, figures))

    def _try(self) -> None:
        if self.enabled:
            self._results.tried.add(self._key)

    def _row(self, times: list[float], figures: dict[str, float]) -> Row:
        """All columns; times in seconds."""
        milliseconds = 1e3 * np.percentile(times, PERCENTILES)
        return {
            "hardware": machine.hardware(),
            "device": machine.device().type,
            "cores": str(usable_cores()),
            "load_before": f"{self._results.load:.2g}",
            **machine.versions(),
            **dict(zip(KEY, self._key, strict=True)),
            "rounds": str(len(times)),
            **{f"p{percent}_ms": f"{value:.4g}" for percent, value in zip(PERCENTILES, milliseconds, strict=True)},
            **{name: f"{value:.3g}" for name, value in figures.items()},
        }


def peak_bytes(run: Callable[[], object]) -> int:
    """Peak GPU memory of one round without its inputs, including gradients."""
    machine.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    machine.synchronize()
    return torch.cuda.max_memory_allocated() - before
