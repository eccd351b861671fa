"""The fixture for benchmarks of operations, this machine's CSV file, and lines below pytest-benchmark's table."""

from collections.abc import Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import machine, peers
from benchmarks.measurement import Measurement, Results
from gptbert.distributed.hardware import usable_cores

RESULTS = pytest.StashKey[Results]()
BUSY = 0.5  # processes per core


@pytest.fixture
def measurement(benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> Iterator[Measurement]:
    """Proves, then times, one implementation of an operation on one shape; skips one that cannot run here."""
    peers.skip_unless_possible(request.node.callspec.params["impl"])
    if benchmark.disabled:
        torch.set_num_threads(1)  # faster for tiny work that runs once, possibly in parallel with other tests
    yield Measurement(benchmark, request, request.config.stash[RESULTS])
    torch.compiler.reset()  # so that the next benchmark's compilation does not count as a recompilation


def pytest_configure(config: pytest.Config) -> None:
    """Start an empty session."""
    config.stash[RESULTS] = Results()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the session's results, if it ran benchmarks."""
    results = session.config.stash[RESULTS]
    if results.tried:
        results.write(machine.results_file(machine.OPERATIONS))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print one line per benchmark with additional figures; pytest-benchmark's table has only times."""
    session = getattr(config, "_benchmarksession", None)
    for result in session.benchmarks if session else []:
        if result.extra_info:
            figures = ", ".join(f"{name} {value:,.2f}" for name, value in result.extra_info.items())
            terminalreporter.write_line(f"{result.name}: {figures}")
    results = config.stash[RESULTS]
    if results.rows:
        terminalreporter.write_line(f"written to {machine.results_file('.csv')}")
    if results.rows and results.load > BUSY * usable_cores():
        busy = f"load {results.load:.1f} on {usable_cores()} cores before the first benchmark"
        terminalreporter.write_line(f"{busy}: others use this machine, and even ratios are doubtful", yellow=True)
