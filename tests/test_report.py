"""Result pages: every value is included, and charts are drawn."""

import csv
import dataclasses
import json

import pytest

from benchmarks.measurement import COLUMNS
from benchmarks.report import ReportConfig, Steps, run, write_pages
from benchmarks.roofline import parameter_count
from benchmarks.stopwatch import PARTS
from gptbert.errors import InputError
from tests.conftest import TINY

PNG = b"\x89PNG"


def result(ranks=1):
    return {
        "case": {"objective": "MLM", "seq_length": 16, "rows": 4, "ranks": ranks},
        "milliseconds": 777.0, "tokens_per_second": 1234.0, "mfu": 0.512, "product_gflops": 400.0,
        "start_seconds": 21.0, "peak_gb": 1.75, "labeled_fraction": 0.2, "rows_ms": 0.7,
        "parts": dict(zip(PARTS, (0.1, 1.0, 150.0, 50.0, 400.0, 100.0, 50.0, 25.9), strict=True)),
    }  # fmt: skip


@pytest.fixture
def report():
    return {
        "hardware": "A Machine", "cores": 2, "load_before": 0.25, "versions": {"torch": "2.13.0", "triton": ""},
        "config_file": "configs/tiny.json", "model": dataclasses.asdict(TINY), "copy_bytes_per_second": 2e9,
        "results": [result(), result(ranks=2)],
    }  # fmt: skip


def write_operations(path):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerow({"op": "lamb", "shape": "small", "impl": "torch", "p50_ms": "48.5"})


def test_a_page_has_every_figure_and_its_charts(tmp_path, report):
    (tmp_path / "a-machine-train-step.json").write_text(json.dumps(report))
    write_operations(tmp_path / "a-machine.csv")
    (page,) = write_pages(tmp_path)
    text = page.read_text()
    assert page.name == "a-machine.md"
    assert "| MLM T=16 B=4 | 777 | 1,234 | 0.512 | 21 | 1.75 |" in text
    assert "| MLM T=16 B=4 2 ranks | 0.1 | 1.0 | 150.0 | 50.0 | 400.0 | 100.0 | 50.0 | 25.9 | 0.7 |" in text
    assert "| lamb | small | torch | 48.5 |" in text
    assert "A Machine, 2 CPU cores; torch 2.13.0; load before 0.2." in text
    for chart in ("throughput", "memory", "roofline"):
        assert f"(a-machine-{chart}.png)" in text
        assert (tmp_path / f"a-machine-{chart}.png").read_bytes().startswith(PNG)


def test_points_of_the_roofline_and_the_optimizers_share_of_bandwidth(report):
    steps = Steps(report)
    share = 52 * parameter_count(TINY) / 0.050 / 2e9
    assert steps.optimizer_bandwidth_share(report["results"][0]) == pytest.approx(share)
    (model_name, _, model_seconds), (_, optimizer, optimizer_seconds) = steps.points()  # of one process only
    assert (model_name, model_seconds, optimizer_seconds) == ("MLM T=16 B=4", pytest.approx(0.6), 0.05)
    assert optimizer.bytes == 52 * parameter_count(TINY)


def test_operations_alone_are_a_page_too(tmp_path):
    write_operations(tmp_path / "other.csv")
    (page,) = write_pages(tmp_path)
    assert "| lamb |" in page.read_text()
    assert not list(tmp_path.glob("*.png"))


def test_no_results_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"--results_dir .*: no \*\.csv or \*-train-step\.json; `make bench`"):
        run(ReportConfig(results_dir=tmp_path))
