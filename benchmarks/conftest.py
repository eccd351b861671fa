"""Prints what benchmarks put into `extra_info` (tokens a second, ratios) under pytest-benchmark's table of times."""

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Show one line for each benchmark that has figures of its own."""
    session = getattr(config, "_benchmarksession", None)
    for result in session.benchmarks if session else []:
        if result.extra_info:
            figures = ", ".join(f"{name} {value:,.2f}" for name, value in result.extra_info.items())
            terminalreporter.write_line(f"{result.name}: {figures}")
