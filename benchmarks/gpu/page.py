"""The page of a report, in Markdown."""

from collections.abc import Callable, Container
from typing import Any

from benchmarks.gpu.cases import CASES, WAYS
from benchmarks.markdown import markdown

NAME_LETTERS = 110
FIGURES: dict[str, Callable[[float], str]] = {  # of a training step
    "ms": "{:.1f}".format,
    "tokens_per_second": "{:,.0f}".format,
    "mfu": "{:.1%}".format,
    "mfu_data_sheet": "{:.1%}".format,
    "host_ms": "{:.1f}".format,
    "busy_ms": "{:.1f}".format,
    "launches": "{:,.0f}".format,
    "peak_gb": "{:.1f}".format,
    "first_step_seconds": "{:.1f}".format,
}
FIGURE_TITLES = (
    *("ms", "tokens/s", "MFU of torch.mm", "MFU of data sheet", "host ms", "busy ms", "launches", "peak GB"),
    "first step s",
)
OPERATION_FIGURES: dict[str, Callable[[float], str]] = {
    "ms": "{:.3f}".format,
    "host_ms": "{:.3f}".format,
    "busy_ms": "{:.3f}".format,
    "launches": "{:.0f}".format,
    "peak_mb": "{:,.0f}".format,
}
OPERATION_TITLES = ("ms", "host ms", "busy ms", "launches", "peak MB")
UNKNOWN = "–"
STEPS_TEXT = """\
bf16, dropout 0.1, everything of a step included, random documents. *ours*: the trainer as it comes; *launched*: with
`--cuda_graph off`; *plain*: with `--kernels torch --no_compile` as well; all in one process. *ms*: back to back;
*host*: until a step that begins on an idle GPU is launched (it waits where the GPU's queue is full); *busy*: sum of the
kernels' times; *first step*: the model, compilation from the shared caches, warm-up."""
OPERATIONS_TEXT = """\
Launched one by one from Python, as who uses them would, so small ones measure the host. Forward and backward, where
there is one."""

Entry = dict[str, Any]
Row = tuple[str, ...]


def page(report: dict[str, Any]) -> str:
    """The whole page of a report."""
    parts = {name: entry for name, entry in report["parts"].items() if entry["result"]}
    sections = [
        *([f"> {report['note']}", ""] if report.get("note") else []),
        *_labels(report),
        *_bars(report["bars"]),
        *_machine(parts.get("machine")),
        *_steps(parts),
        *_operations(parts.get("operations")),
        *_right(parts),
        *([] if report.get("note") else _parts(report["parts"])),
        *report.get("notes", []),
    ]
    title = f"# {'Rehearsal on ' if report['rehearsal'] else ''}{report['gpu']}"
    return "\n".join([title, "", *sections]).rstrip() + "\n"


def table(header: Row, rows: list[Row], text_columns: Container[int] = (0,)) -> list[str]:
    """Lines of a table, and one that is empty; none without rows."""
    return [*markdown([header, *rows], text_columns), ""] if rows else []


def shown(value: float | None, how: Callable[[float], str] | None = None) -> str:
    """A number, or a dash for None; by default with at least three digits."""
    if value is None:
        return UNKNOWN
    return how(value) if how else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _labels(report: dict[str, Any]) -> list[str]:
    names = ("commit", "date", "torch", "triton", "python", "liger-kernel", "cut-cross-entropy", "minutes")
    known = [f"{name} {report[name]}" for name in names if report.get(name) not in {None, ""}]
    command = "" if report.get("note") else "`python -m benchmarks.gpu`: "
    return [f"{command}{', '.join(known)}.", ""]


def _bars(bars: list[dict[str, Any]]) -> list[str]:
    rows = []
    for bar in bars:
        sign = "at least" if bar["is_least"] else "at most"
        verdict = {True: "held", False: "**missed**", None: "not measured"}[bar["held"]]
        limit = f"{sign} {shown(bar['limit'])}"
        rows.append((bar["name"], *(shown(bar[key]) for key in ("published", "found")), limit, verdict,
                     shown(bar["goal"])))  # fmt: skip
    header = ("figure", "published code, H100", "found", "bar", "", "goal")
    return ["## Bars", "", "Those of an H100; elsewhere they only compare.", "", *table(header, rows)]


def _machine(entry: Entry | None) -> list[str]:
    if not entry:
        return []
    rows = []
    for name, value in entry["result"].items():
        if isinstance(value, dict):
            rows += [(f"{inner}, {name}", str(found)) for inner, found in value.items()]
        elif name != "summary":
            rows.append((name.replace("_", " "), f"{value:,.4g}" if isinstance(value, float) else str(value)))
    return ["## Machine", "", *table(("", ""), rows)]


def _steps(parts: dict[str, Entry]) -> list[str]:
    found = {name: parts[f"steps {name}"]["result"] for name in CASES if f"steps {name}" in parts}
    if not found:
        return []
    lines = [
        "## Training steps",
        "",
        STEPS_TEXT,
        "",
    ]
    rows = []
    for name, result in found.items():
        for way in WAYS:
            if figures := result.get(way):
                cells = (shown(figures.get(key), how) for key, how in FIGURES.items())
                rows.append((name, way, *cells))
    lines += table(("case (rows × T)", "", *FIGURE_TITLES), rows, text_columns=(0, 1))
    for name, result in found.items():
        for way in WAYS:
            lines += _kernels(f"{name}, {way}", result.get(way, {}))
    return lines


def _kernels(title: str, figures: dict[str, Any]) -> list[str]:
    if not figures.get("kernels"):
        return []
    rows = [
        (f"`{kernel['name'][:NAME_LETTERS].replace('|', '/')}`", f"{kernel['ms']:.3f}", f"{kernel['calls']:.1f}")
        for kernel in figures["kernels"]
    ]
    busy, launches = (shown(figures.get(key), FIGURES[key]) for key in ("busy_ms", "launches"))
    return [
        f"### {title}: kernels that take longest",
        "",
        f"All of a step: {busy} ms, {launches} launches.",
        "",
        *table(("kernel", "ms", "calls"), rows),
    ]


def _operations(entry: Entry | None) -> list[str]:
    if not entry:
        return []
    lines = [
        "## Operations",
        "",
        OPERATIONS_TEXT,
        "",
    ]
    rows, reasons = [], []
    for operation, implementations in entry["result"]["rows"].items():
        for impl, row in implementations.items():
            if reason := row.get("left_out") or row.get("failed"):
                kind = "left out" if "left_out" in row else "**failed**"
                reasons.append(f"- {operation}, {impl}: {kind}: {reason}")
            else:
                cells = (shown(row.get(key), how) for key, how in OPERATION_FIGURES.items())
                rows.append((operation, impl, *cells))
    lines += table(("operation", "implementation", *OPERATION_TITLES), rows, text_columns=(0, 1))
    return [*lines, *reasons, ""] if reasons else lines


def _right(parts: dict[str, Entry]) -> list[str]:
    names = ("check", "check before a run", "resume, compiled", "resume, not compiled", "soak", "tests")
    lines = []
    for name in names:
        result = parts.get(name, {}).get("result", {})
        if result.get("summary"):
            lines.append(f"- **{name}**: {result['summary']}")
            lines += [f"  - {failure}" for failure in result.get("failures", [])]
    return ["## Right or wrong", "", *lines, ""] if lines else []


def _parts(parts: dict[str, Entry]) -> list[str]:
    rows = []
    for name, entry in parts.items():
        if said := [text for text in (entry["message"], entry["result"].get("summary", "")) if text]:
            rows.append((name, entry["status"], f"{entry['seconds']:.1f}", "; ".join(said)))
    lines = ["## Parts", "", *table(("part", "", "s", ""), rows, text_columns=(0, 1))] if rows else []
    for name, entry in parts.items():
        if entry.get("log"):
            lines += [f"The last lines of {name}:", "", "```", *entry["log"], "```", ""]
    return lines
