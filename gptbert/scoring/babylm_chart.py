"""A picture of BabyLM's scores: bars for one checkpoint, curves over the words seen for several.

matplotlib draws it, which is no dependency: without it there is none.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

Scores = Mapping[str, float]  # by task


def can_draw() -> bool:
    """Whether matplotlib is there."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_bars(file: Path, scores: Mapping[str, Scores], title: str) -> None:
    """Write a PNG with a group of bars for each task, one bar for each backend.

    Args:
        file: to write.
        scores: by backend.
        title: of the picture.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415  not always there

    tasks = list(next(iter(scores.values())))
    figure = Figure(figsize=(max(5.0, 1.1 * len(tasks)), 4.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(scores)
    for number, (backend, values) in enumerate(scores.items()):
        places = [index + (number - (len(scores) - 1) / 2) * width for index in range(len(tasks))]
        bars = axes.bar(places, [values[task] for task in tasks], width, label=backend)
        axes.bar_label(bars, fmt="%.1f", fontsize=7)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set_xticks(range(len(tasks)), tasks, rotation=30, ha="right")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(file, format="png", dpi=150)


def draw_curves(file: Path, words: Sequence[float], scores: Mapping[str, Sequence[Scores]], title: str) -> None:
    """Write a PNG with a small chart for each task, of its score over the words seen, one line for each backend.

    Args:
        file: to write.
        words: seen by each checkpoint, ascending.
        scores: by backend, of each checkpoint.
        title: of the picture.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415  not always there
    from matplotlib.ticker import EngFormatter, NullFormatter  # noqa: PLC0415

    tasks = list(next(iter(scores.values()))[0])
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.5 * rows + 0.6), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(tasks) :]:
        axes.set_axis_off()
    for axes, task in zip(grid.flat, tasks, strict=False):
        for backend, of_checkpoints in scores.items():
            axes.plot(words, [values[task] for values in of_checkpoints], marker="o", markersize=3, label=backend)
        axes.set_xscale("log")
        axes.set_title(task, fontsize=9)
        axes.set_xlabel("words seen", fontsize=8)
        axes.tick_params(which="both", labelsize=7)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_minor_formatter(NullFormatter() if words[-1] >= 10 * words[0] else EngFormatter(sep=""))
        axes.grid(alpha=0.3)
    grid.flat[0].legend(fontsize=7)
    figure.suptitle(title, fontsize=10)
    figure.savefig(file, format="png", dpi=150)
