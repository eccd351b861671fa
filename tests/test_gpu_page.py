"""The GPU results page: every value is on it, thresholds are checked, and the repository's pages match their data."""

import json

import pytest

from benchmarks import machine
from benchmarks.gpu.bars import BARS, verdicts
from benchmarks.gpu.cases import CASES
from benchmarks.gpu.page import page
from benchmarks.report import write_pages

CASE = "base_32k hybrid 32 × 128"
CE = "masked_cross_entropy N=4096 D=768 V=32768"
KERNELS = [{"name": "gemv<float, 1 | 2>", "ms": 1.25, "calls": 24.0}, {"name": "rows_kernel", "ms": 0.5, "calls": 1.0}]


def entry(result, status="done", message="", **more):
    return {"status": status, "seconds": 12.34, "message": message, "result": result, **more}


def figures(**changes):
    return {
        "ms": 40.0, "tokens_per_second": 102_400.0, "mfu": 0.123, "mfu_data_sheet": 0.0954, "host_ms": 4.56,
        "busy_ms": 38.9, "launches": 876.0, "peak_gb": 4.21, "first_step_seconds": 11.1, "kernels": KERNELS, **changes,
    }  # fmt: skip


@pytest.fixture
def report():
    rows = {
        "triton_packed": {"ms": 3.0, "host_ms": 0.4, "busy_ms": 2.9, "launches": 12, "peak_mb": 237.0},
        "eager": {"ms": 4.0, "host_ms": 0.1, "busy_ms": 3.9, "launches": 20, "peak_mb": 2000.0},
        "liger": {"left_out": "liger is not installed"},
        "cut_cross_entropy": {"failed": "RuntimeError: no"},
    }
    parts = {
        "machine": entry({"product_tflops": 767.2, "at rest": {"driver": "580.1"}, "summary": "fast"}),
        "check": entry({"failed": 1, "failures": ["lamb, p: error 2, allowed 1"], "summary": "244 comparisons, 1 out"}),
        f"steps {CASE}": entry({"ours": figures(), "plain": figures(ms=121.0, kernels=[])}),
        "operations": entry({"rows": {CE: rows}}),
        "resume, compiled": entry({"differing": 0, "summary": "0 of 60 tensors differ"}),
        "soak": entry({}, "failed", "exit status 1", log=["Traceback", "OutOfMemoryError"]),
    }
    return {"gpu": "A GPU", "rehearsal": False, "commit": "abc123", "torch": "2.11.0", "parts": parts}


def test_every_figure_is_on_the_page(report):
    text = page(report | {"bars": verdicts(report["parts"])})
    for line in (
        "# A GPU",
        "`python -m benchmarks.gpu`: commit abc123, torch 2.11.0.",
        f"| {CASE} | ours | 40.0 | 102,400 | 12.3% | 9.5% | 4.6 | 38.9 | 876 | 4.2 | 11.1 |",
        f"| {CASE} | plain | 121.0 | 102,400 | 12.3% | 9.5% | 4.6 | 38.9 | 876 | 4.2 | 11.1 |",
        f"### {CASE}, ours: kernels that take longest",
        "| `gemv<float, 1 / 2>` | 1.250 | 24.0 |",
        f"| {CE} | triton_packed | 3.000 | 0.400 | 2.900 | 12 | 237 |",
        f"- {CE}, liger: left out: liger is not installed",
        f"- {CE}, cut_cross_entropy: **failed**: RuntimeError: no",
        "| product tflops | 767.2 |",
        "| driver, at rest | 580.1 |",
        "- **check**: 244 comparisons, 1 out",
        "  - lamb, p: error 2, allowed 1",
        "- **resume, compiled**: 0 of 60 tensors differ",
        "| soak | failed | 12.3 | exit status 1 |",
        "OutOfMemoryError",
    ):
        assert line in text.splitlines(), line
    assert f"### {CASE}, plain" not in text


def test_bars_are_held_missed_or_not_measured(report):
    found = {bar["name"]: (bar["found"], bar["held"]) for bar in verdicts(report["parts"])}
    assert found[f"{CASE}, tokens/s"] == (102_400.0, False)
    assert found["small MLM 256 × 128, tokens/s"] == (None, None)
    assert found[f"{CE}: time over eager PyTorch's"] == (0.75, True)
    assert found[f"{CE}: memory over eager PyTorch's"] == (0.1185, False)
    assert found[f"{CE}: launches"] == (12, True)
    assert found["check of the kernels: comparisons out of their bounds"] == (1, False)
    assert found["resume, compiled: tensors that differ"] == (0, True)
    assert found["resume, not compiled: tensors that differ"] == (None, None)
    text = page(report | {"bars": verdicts(report["parts"])})
    assert f"| {CASE}, tokens/s | 38,600 | 102,400 | at least 250,000 | **missed** | 370,000 |" in text
    assert f"| {CE}: launches | – | 12 | at most 12 | held | – |" in text


@pytest.mark.parametrize("missing", ["triton_packed", "eager"])
def test_what_is_not_measured_is_compared_with_nothing(report, missing):
    report["parts"]["operations"]["result"]["rows"][CE][missing] = {"failed": "RuntimeError: no"}
    found = {bar["name"]: bar["held"] for bar in verdicts(report["parts"])}
    assert found[f"{CE}: time over eager PyTorch's"] is None
    assert found[f"{CE}: memory over eager PyTorch's"] is None
    assert found[f"{CE}: launches"] is (True if missing == "eager" else None)


def test_every_case_has_its_bar():
    names = {bar.name for bar in BARS}
    assert {f"{name}, tokens/s" for name in CASES} <= names
    assert len(names) == len(BARS)


def test_a_report_that_has_just_begun_is_a_page_too(report):
    parts = {f"steps {CASE}": entry({"ours": figures()}, "running"), "operations": entry({"rows": {CE: {}}}, "running")}
    text = page(report | {"parts": parts, "bars": verdicts(parts)})
    assert "102,400" in text
    assert "**missed**" in text


def test_pages_in_the_repository_are_those_of_their_files(tmp_path):
    """Regenerate with `python -m benchmarks.report`."""
    files = [path for path in machine.RESULTS.glob("*.json") if not path.name.endswith(machine.STEPS)]
    assert len(files) >= 2
    for path in files:
        content = json.loads(path.read_text(encoding="utf-8"))
        assert content["bars"] == verdicts(content["parts"]), path
        (tmp_path / path.name).write_text(json.dumps(content))
    for written in write_pages(tmp_path):
        assert written.read_text() == (machine.RESULTS / written.name).read_text(encoding="utf-8"), written.name
