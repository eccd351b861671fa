"""`python -m gptbert.report RUN`: a run as one self-contained HTML page, without network access or scripts."""

import dataclasses
import json
import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import tyro
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from gptbert.command_line import run_command
from gptbert.config import ModelConfig, TrainConfig
from gptbert.errors import InputError, first_line
from gptbert.io.json_file import read_json
from gptbert.io.names import CHECKPOINTS, MEASURES, METRICS, MODEL_CONFIG, RUN_CONFIG, SAMPLES
from gptbert.io.outputs import check_outputs, staged_outputs
from gptbert.monitoring import chart
from gptbert.monitoring.chart import Chart, Line, draw
from gptbert.monitoring.records import read_records
from gptbert.schedules import MOST_INITIAL, initial_share

OBJECTIVES = {"mlm": "masked", "clm": "causal"}
WEIGHTS = {"train": "training", "validation": "validation", "validation_ema": "averaged weights"}
MOST_SAMPLES = 12  # steps shown per text
_CONFIG_BYTES = 1 << 20
_LATEST = 2**53  # larger steps are damaged data


@dataclass(frozen=True)
class ReportConfig:
    """Write a run's losses, schedules, speed, samples and settings as one HTML page, for a browser.

    The run may be finished, in progress, or killed.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run's folder, or one of its checkpoints'."""
    output: Path | None = None
    """File to write or replace; default: RUN/report.html."""


def write_report(run_dir: Path, output: Path | None = None) -> Path:
    """Write the page.

    Args:
        run_dir: a run's folder; the run may still be in progress.
        output: written atomically; None for report.html in the run's folder.

    Returns:
        The page's path.

    Raises:
        InputError: there is no run, or the page cannot be written.
    """
    run_dir = _run_dir(run_dir)
    output = output or run_dir / "report.html"
    check_outputs([output], [])
    page = render(run_dir)
    if not output.absolute().parent.is_dir():  # perhaps a misspelled run name
        raise InputError(f"--output {output}: cannot be written (there is no such folder)")
    with staged_outputs(output, what="--output") as (staged,):
        staged.write_text(page, encoding="utf-8", errors="replace")  # JSON may contain lone surrogates
    return output


def _run_dir(path: Path) -> Path:
    """The run's folder; for a checkpoint's, or that of all checkpoints, that of its run."""
    above = path.resolve().parent
    if path.resolve().name == CHECKPOINTS and (above / RUN_CONFIG).exists():
        return above
    if (path / RUN_CONFIG).exists() or not (path / MODEL_CONFIG).exists():
        return path
    from gptbert.checkpoint.folder import run_dir_of  # noqa: PLC0415  loads PyTorch

    if (run_dir := run_dir_of(path)) is None:
        raise InputError(f"{path}: a checkpoint without its run's records; name the run's folder")
    return run_dir


def render(run_dir: Path) -> str:
    """The page of a run.

    Raises:
        InputError: there is no run, or its config.json is damaged.
    """
    settings = _settings(run_dir)
    records = _of_steps(read_records(run_dir / METRICS))
    train = settings["train"]
    last_step = records[-1]["step"] if records else 0
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"measure": measure, "visible": visible}
    return environment.get_template("report.html.jinja").render(
        name=train.get("name", run_dir.name),
        status=_status(run_dir, last_step, train.get("max_steps"), bool(records)),
        facts=_facts(run_dir, settings, records),
        objectives=OBJECTIVES,
        metrics=MEASURES,
        results=list(_results(records)),
        chart=chart,
        progress=[drawn for drawn in _progress(records) if drawn],
        charts=[drawn for drawn in _charts(records, train) if drawn],
        texts=_texts(run_dir),
        settings={
            "training": _beside_defaults(train),
            "model": [(name, as_text(value), None) for name, value in settings["model"].items()],
        },
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
    )


def measure(value: float, metric: str) -> str:
    """Format a result with the precision suited to its metric."""
    if not math.isfinite(value):
        return str(value)
    return {"loss": f"{value:.3f}", "perplexity": f"{value:,.1f}", "accuracy": f"{value:.1%}"}[metric]


def visible(token: str) -> str:
    """A token with line breaks and other invisible characters made visible."""
    shown = token.replace("\n", "↵").replace("\t", "⇥")
    return "".join(character if character.isprintable() else "�" for character in shown) or "∅"


def as_text(value: object) -> str:
    """A setting as on the command line."""
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "(none)"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _settings(run_dir: Path) -> dict[str, Any]:
    path = run_dir / RUN_CONFIG
    try:
        settings = read_json(path, _CONFIG_BYTES)
    except FileNotFoundError as error:
        raise InputError(f"{run_dir}: no run is there (it has no config.json)") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({first_line(error)})") from error
    if not isinstance(settings, dict) or not all(isinstance(settings.get(key), dict) for key in ("train", "model")):
        raise InputError(f"{path}: not the settings of a run")
    return settings


def _of_steps(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records sorted by step; those without a valid step are omitted."""
    return sorted(
        (record for record in records if type(record["step"]) is int and 0 <= record["step"] < _LATEST),
        key=lambda record: record["step"],
    )


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _points(records: list[dict[str, Any]], key: str, factor: float = 1.0) -> list[chart.Point]:
    numbers = ((record["step"], _number(record.get(key))) for record in records)
    return [(step, factor * value) for step, value in numbers if value is not None]


def _status(run_dir: Path, step: int, max_steps: object, has_records: bool) -> str:
    if not has_records:
        return "no records yet"
    if not isinstance(max_steps, int) or max_steps < 1:
        return f"at step {step:,}"
    if step >= max_steps:
        return f"finished after {step:,} steps"
    time = datetime.fromtimestamp((run_dir / METRICS).stat().st_mtime).astimezone()
    return f"at step {step:,} of {max_steps:,} ({step / max_steps:.0%}), last record of {time:%Y-%m-%d %H:%M}"


def _facts(run_dir: Path, settings: dict[str, Any], records: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Short facts about the run and its hardware; unknown ones are omitted."""
    hardware = settings.get("hardware", settings.get("device", "?"))
    facts = [("processes", f"{settings.get('world_size', '?')} × {hardware}")]
    facts += [(name, str(settings[name])) for name in ("kernels", "torch") if name in settings]
    with suppress(TypeError, InputError):  # settings of a different version
        facts.append(("parameters", f"{ModelConfig(**settings['model']).num_parameters:,}"))
    tokens, skipped = _points(records, "train/tokens"), _points(records, "train/skipped_steps")
    facts += [("tokens seen", chart.number(value)) for _, value in tokens[-1:]]
    with suppress(TypeError, KeyError, ValueError, IndexError, OverflowError):
        share = initial_share(float(settings["train"]["ema_decay"]), int(records[-1]["step"]))
        if share > MOST_INITIAL:
            facts.append(("averaged weights", f"{share:.0%} still initial ones"))
    facts += [("skipped steps", chart.number(value)) for _, value in skipped[-1:]]
    checkpoints = sorted(path.name for path in (run_dir / "checkpoints").glob("step_*") if path.suffix == "")
    return facts + [("newest checkpoint", name) for name in checkpoints[-1:]]


def _results(records: list[dict[str, Any]]) -> Iterator[tuple[str, int, dict[str, dict[str, float]]]]:
    """Latest results of training, and of validation for both kinds of weights: name, step, and metrics by objective."""
    for prefix, name in WEIGHTS.items():
        found: dict[str, dict[str, float]] = {}
        last = 0
        for objective in OBJECTIVES:
            series = {metric: _points(records, f"{prefix}/{objective}/{metric}") for metric in MEASURES}
            if all(series.values()):
                found[objective] = {metric: points[-1][1] for metric, points in series.items()}
                last = max(last, *(int(points[-1][0]) for points in series.values()))
        if found:
            yield name, last, found


def _progress(records: list[dict[str, Any]]) -> Iterator[Chart | None]:
    for metric, title, factor in (("loss", "Loss (nats a token)", 1), ("accuracy", "Accuracy (%)", 100)):
        lines = [
            Line(
                f"{OBJECTIVES[objective]}, {name}",
                f"{objective} {prefix}",
                _points(records, f"{prefix}/{objective}/{metric}", factor),
                has_marks=prefix != "train",
            )
            for objective in OBJECTIVES
            for prefix, name in WEIGHTS.items()
        ]
        yield draw(title, lines)
    pairs = [
        Line(f"{name}, {WEIGHTS['validation_ema']}", f"{objective} validation_ema", points, has_marks=True)
        for objective, name in OBJECTIVES.items()
        if (points := _points(records, f"pairs/{objective}/accuracy", 100))
    ]
    yield draw("Minimal pairs (%)", pairs)


def _charts(records: list[dict[str, Any]], train: dict[str, Any]) -> Iterator[Chart | None]:
    """Charts of all other measurements."""

    def plain(title: str, key: str, factor: float = 1.0) -> Chart | None:
        return draw(title, [Line(title, "plain", _points(records, f"train/{key}", factor))], from_zero=True)

    yield plain("Learning rate", "learning_rate")
    yield plain("Masked tokens (%)", "mask_p", 100)
    yield plain("Rows in a step", "batch_size")
    yield plain("Tokens in a row", "sequence_length")
    norms = _points(records, "train/gradient_norm")
    limit = _number(train.get("max_gradient"))
    clipped = [] if limit is None else [(step, limit) for step, _ in norms[:: max(1, len(norms) - 1)]]
    lines = [Line("gradient norm", "plain", norms), Line("clipped to", "limit", clipped)]
    yield draw("Gradient norm", lines, log=True) if norms else None
    yield plain("Skipped steps, in all", "skipped_steps")
    yield plain("Tokens per second", "tokens_per_second")
    shares = (("mfu", "plain", "model FLOP utilization"), ("waiting_share", "limit", "time waiting for rows"))
    lines = [Line(name, style, _points(records, f"train/{key}", 100)) for key, style, name in shares]
    yield draw("Use of the machines (%)", lines, from_zero=True)
    yield plain("Peak memory of a process (GB)", "peak_memory_gb")


def _texts(run_dir: Path) -> list[dict[str, Any]]:
    """The texts of samples.jsonl: parts between masks, the masked tokens, and guesses at some of the steps."""
    texts: dict[str, dict[str, Any]] = {}
    for record in _of_steps(read_records(run_dir / SAMPLES)):
        if not _is_sample(record):
            continue
        parts = record["text"].split("<mask>")
        if len(parts) != len(record["answers"]) + 1:  # the text contains a literal "<mask>"
            parts = [record["text"]]
        text = texts.setdefault(record["text"], {"parts": parts, "answers": record["answers"], "steps": {}})
        if record["answers"] == text["answers"]:
            text["steps"][record["step"]] = record["guesses"]
    for text in texts.values():
        steps = list(text["steps"])
        last = len(steps) - 1
        shown = {steps[round(last * i / (MOST_SAMPLES - 1))] for i in range(MOST_SAMPLES)}
        text["steps"] = {step: text["steps"][step] for step in steps if step in shown}
    return list(texts.values())


def _is_sample(record: dict[str, Any]) -> bool:
    try:
        text, answers, guesses = (record[name] for name in ("text", "answers", "guesses"))
        pairs = [pair for mask in guesses for pair in mask]
        return (
            isinstance(text, str)
            and all(isinstance(answer, str) for answer in answers)
            and len(guesses) == len(answers)
            and all(isinstance(guess, str) and _number(share) is not None for guess, share in pairs)
        )
    except (KeyError, TypeError, ValueError):
        return False


def _beside_defaults(train: dict[str, Any]) -> list[tuple[str, str, str | None]]:
    """Settings with their values, and their defaults if different."""
    defaults = {
        field.name: json.loads(json.dumps(field.default, default=str))
        for field in dataclasses.fields(TrainConfig)
        if field.default is not dataclasses.MISSING
    }
    rows = []
    for name, value in train.items():
        differs = name in defaults and value != defaults[name]
        rows.append((name, as_text(value), as_text(defaults[name]) if differs else None))
    return rows


def report(config: ReportConfig) -> None:
    """Write the page and print its path."""
    print(f"wrote {write_report(config.run, config.output)}")


def main() -> None:
    """Entry point."""
    run_command(ReportConfig, report)


if __name__ == "__main__":
    main()
