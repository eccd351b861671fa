"""Markdown and charts of results, one page per machine: `python -m benchmarks.report`.

Reads the CSV files of `pytest benchmarks` and the JSON files of `bench_train_step --save` and of `benchmarks.gpu` in a
folder, and writes pages and their PNG files to it.
"""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.bench_train_step import Case
from benchmarks.gpu.page import page as gpu_page
from benchmarks.markdown import markdown
from benchmarks.roofline import Limits, TrainingStep, Work
from benchmarks.stopwatch import PARTS
from gptbert.command_line import run_command
from gptbert.config import ModelConfig
from gptbert.errors import InputError
from gptbert.io.imports import explained

with explained():  # matplotlib comes with `make install`, not with the package
    import matplotlib as mpl
    from matplotlib import pyplot as plt
    from matplotlib.axes import Axes

OPERATION_COLUMNS = ("op", "shape", "impl", "p50_ms", "speed_over_reference_eager", "share_of_copy_bandwidth")

Table = list[tuple[str, ...]]


@dataclass(frozen=True)
class Steps:
    """Results of `bench_train_step` on a machine.

    Attributes:
        report: its JSON object.
    """

    report: dict[str, Any]

    @property
    def results(self) -> list[dict[str, Any]]:
        """Figures, one per case."""
        return self.report["results"]

    @property
    def names(self) -> list[str]:
        """Names of the cases."""
        return [Case(**result["case"]).name for result in self.results]

    def training_step(self, result: dict[str, Any]) -> TrainingStep:
        """The work of a case's step, over all processes."""
        case = Case(**result["case"])
        return TrainingStep(
            case.model(ModelConfig(**self.report["model"])), case.rows, case.seq_length, result["labeled_fraction"]
        )

    def limits(self) -> Limits:
        """The best rates of matmuls and copies."""
        flops = max(1e9 * result["product_gflops"] for result in self.results)
        return Limits(self.report["hardware"], flops, self.report["copy_bytes_per_second"])

    def optimizer_bandwidth_share(self, result: dict[str, Any]) -> float:
        """Bandwidth of clipping, LAMB and the average, by the minimum of bytes, relative to a copy's."""
        moved = self.training_step(result).optimizer().bytes
        return moved / (1e-3 * result["parts"]["optimizer"]) / self.report["copy_bytes_per_second"]

    def points(self) -> list[tuple[str, Work, float]]:
        """Name, work and seconds of the model and of the optimizer, for cases with one process."""
        found = []
        for name, result in zip(self.names, self.results, strict=True):
            if Case(**result["case"]).ranks > 1:
                continue
            step, parts = self.training_step(result), result["parts"]
            work = sum((part.ours for part in step.model_parts()), Work())
            found.append(
                (name, work, 1e-3 * sum(parts.get(part, 0.0) for part in ("forward", "cross-entropy", "backward")))
            )
            found.append((f"optimizer, {name}", step.optimizer(), 1e-3 * parts["optimizer"]))
        return found


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Turn results into pages with charts."""

    results_dir: Path = machine.RESULTS
    """Folder of results and pages."""


def run(config: ReportConfig) -> None:
    """Write all pages, and print their paths.

    Raises:
        InputError: the folder has no results.
    """
    pages = write_pages(config.results_dir)
    for page in pages:
        print(page)
    if not pages:
        raise InputError(
            f"--results_dir {config.results_dir}: no *{machine.OPERATIONS} or *{machine.STEPS}; `make bench` makes them"
        )


def write_pages(folder: Path) -> list[Path]:
    """Write a page with charts for each machine with results in the folder; returns their paths."""
    suffixes = (machine.OPERATIONS, machine.STEPS)
    machines = {path.name.removesuffix(suffix) for suffix in suffixes for path in folder.glob(f"*{suffix}")}
    gpus = {path for path in folder.glob("*.json") if not path.name.endswith(machine.STEPS)}
    return [*(write_page(folder, name) for name in sorted(machines)), *(write_gpu_page(path) for path in sorted(gpus))]


def write_gpu_page(report: Path) -> Path:
    """The page of the results of `benchmarks.gpu`."""
    page = report.with_suffix(".md")
    page.write_text(gpu_page(json.loads(report.read_text(encoding="utf-8"))), encoding="utf-8")
    return page


def write_page(folder: Path, name: str) -> Path:
    """The page of a machine."""
    lines = []
    steps_file, operations_file = folder / f"{name}{machine.STEPS}", folder / f"{name}{machine.OPERATIONS}"
    if steps_file.exists():
        report = json.loads(steps_file.read_text(encoding="utf-8"))
        steps = Steps(report)
        draw(steps, folder, name)
        lines += step_lines(steps, name)
    if operations_file.exists():
        with operations_file.open(newline="", encoding="utf-8") as file:
            rows = [tuple(row[column] for column in OPERATION_COLUMNS) for row in csv.DictReader(file)]
        lines += ["## Operations", "", "`python -m pytest benchmarks --benchmark-enable`", ""]
        lines += markdown([OPERATION_COLUMNS, *rows], text_columns=(0, 1, 2))
    page = folder / f"{name}{'-bench' if (folder / f'{name}.json').exists() else ''}.md"  # the other is a GPU's
    page.write_text("\n".join([f"# {name}", "", *lines, ""]), encoding="utf-8")
    return page


def step_lines(steps: Steps, name: str) -> list[str]:
    """The part of a page about training steps."""
    report, limits = steps.report, steps.limits()
    figures: Table = [("case", "ms/step", "tokens/s", "MFU", "start s", "peak GB", "optimizer / copy")]
    parts: Table = [("case", *(f"{part} ms" for part in PARTS), "(rows ms)")]
    for case, result in zip(steps.names, steps.results, strict=True):
        figures.append(
            (
                case, f"{result['milliseconds']:.0f}", f"{result['tokens_per_second']:,.0f}", f"{result['mfu']:.3f}",
                f"{result['start_seconds']:.0f}", f"{result['peak_gb']:.2f}",
                f"{steps.optimizer_bandwidth_share(result):.2f}",
            )
        )  # fmt: skip
        took = {part: f"{milliseconds:.1f}" for part, milliseconds in result["parts"].items()}
        parts.append((case, *(took.get(part, "–") for part in PARTS), f"{result['rows_ms']:.1f}"))
    versions = ", ".join(f"{library} {version}" for library, version in report["versions"].items() if version)
    return [
        f"{report['hardware']}, {report['cores']} CPU cores; {versions}; load before {report['load_before']:.1f}.",
        "",
        "## Training steps",
        "",
        f"`python -m benchmarks.bench_train_step --config_file {report['config_file']} --save`: bf16, all included.",
        f"Best rates of the run: torch.mm {limits.flops / 1e9:,.0f} GFLOPS, copy {limits.bandwidth / 1e9:.1f} GB/s.",
        "",
        *markdown(figures),
        "",
        "A step is the sum of these; rows are made on a thread beside.",
        "",
        *markdown(parts),
        "",
        *(f"![{chart}]({name}-{chart}.png)" for chart in ("throughput", "memory", "roofline")),
        "",
    ]


def draw(steps: Steps, folder: Path, name: str) -> None:
    """The three charts."""
    mpl.use("Agg")
    charts = {
        "throughput": (draw_bars, "tokens_per_second", "tokens/s"),
        "memory": (draw_bars, "peak_gb", "peak memory, GB"),
        "roofline": (draw_roofline,),
    }
    for chart, (function, *arguments) in charts.items():
        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        function(axes, steps, *arguments)
        axes.set_title(f"{steps.report['hardware']}, {Path(steps.report['config_file']).stem}")
        figure.savefig(folder / f"{name}-{chart}.png", dpi=120)
        plt.close(figure)


def draw_bars(axes: Axes, steps: Steps, figure: str, label: str) -> None:
    """One bar per case."""
    bars = axes.barh(steps.names, [result[figure] for result in steps.results])
    axes.bar_label(bars, fmt="{:,.4g}", padding=3)
    axes.margins(x=0.12)
    axes.invert_yaxis()
    axes.set_xlabel(label)


def draw_roofline(axes: Axes, steps: Steps) -> None:
    """FLOPs per second over FLOPs per byte (counted by `benchmarks.roofline`), below the machine's limits."""
    limits = steps.limits()
    intensities = [0.1, limits.flops / limits.bandwidth, 1000.0]
    axes.loglog(intensities, [min(limits.flops, limits.bandwidth * each) / 1e9 for each in intensities], color="black")
    for name, work, seconds in steps.points():
        axes.plot(work.flops / work.bytes, work.flops / seconds / 1e9, marker="o", linestyle="", label=name)
    axes.set_xlabel("FLOPs a byte")
    axes.set_ylabel("GFLOPS")
    axes.legend(fontsize="small")


if __name__ == "__main__":
    run_command(ReportConfig, run)
