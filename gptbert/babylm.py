"""`python -m gptbert.babylm RUN DATA`: all zero-shot tasks of BabyLM's evaluation, for a model or for all of a run.

The numbers are those of the evaluation's code: babylm/evaluation-pipeline-2025 at commit bf55c11, which
babylm-org/babylm-eval of 2026 has unchanged (at 45fe2c1). `mntp` is that of this version, where the token itself is
masked and read from the position before it; versions before d6e6797 (2 August 2025), such as 5182e30, mask the token
behind it if the tokenizer puts `<s>` in front, and so see the answer. docs/babylm.md has the definitions.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from tqdm import tqdm

from gptbert.checkpoint.folder import (
    is_for_transformers,
    list_checkpoints,
    list_word_checkpoints,
    newest_in,
    settings_if_any,
)
from gptbert.command_line import run_command
from gptbert.errors import InputError, prefix_errors
from gptbert.import_hf import load_converted
from gptbert.io.names import MODEL_CONFIG
from gptbert.io.outputs import check_outputs, staged_outputs
from gptbert.io.screen import log, table
from gptbert.scoring.acquisition import Acquisition, words_in_name
from gptbert.scoring.babylm_chart import can_draw, draw_bars, draw_curves
from gptbert.scoring.choices import Choices
from gptbert.scoring.closing import right_ties_line, unknown_line, unknown_share
from gptbert.scoring.evaluation_folder import FOLDERS, Task, read_tasks
from gptbert.scoring.passages import Passage, num_scored, score_passages
from gptbert.scoring.trained_model import ModelChoice, TrainedModel

PIPELINE = "babylm/evaluation-pipeline-2025 at bf55c11"
_MAIN = "main"  # BabyLM's name for the model at the end
_WUGS = ("wug_adj", "wug_past")


@dataclass(frozen=True, kw_only=True)
class BabylmSettings(ModelChoice):
    """All zero-shot tasks of BabyLM's evaluation folder: one JSON file, one table, one picture.

    What is found in DATA, and what is left out, is listed before the work.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run's folder, an exported one or a checkpoint's. All checkpoints by words in it are evaluated (chck_1M and so
    on), and then its newest checkpoint; name a single one to evaluate only that."""
    data: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """BabyLM's evaluation_data/full_eval or evaluation_data/fast_eval."""
    tasks: tuple[Literal[tuple(FOLDERS)], ...] | None = None  # type: ignore[valid-type]  # tyro sees the values
    """Tasks to evaluate. Default: all that are in DATA."""
    backend: tuple[Literal["causal", "mntp", "mlm"], ...] | None = None
    """Default: those that the model was trained for, causal and mntp for a hybrid. mlm reads a masked token from its
    own position, as of a BERT; GPT-BERT predicts it from the position before."""
    batch_tokens: int = 8192
    """Tokens that go through the model at once."""
    output: Path | None = None
    """JSON file for all results; the picture is next to it, as .png. Default: RUN/babylm.json; for a checkpoint's
    folder, which may be deleted, step_00001000_babylm.json next to it, and so on."""

    def __post_init__(self) -> None:
        for name in ("tasks", "backend"):
            if getattr(self, name) == ():
                raise InputError(f"--{name}: needs at least one")
        if self.batch_tokens < 1:
            raise InputError(f"--batch_tokens is {self.batch_tokens}, expected at least 1")
        if self.output and self.output.suffix == ".png":
            raise InputError(f"--output {self.output}: is the name of the picture; name the JSON file")


@dataclass(frozen=True)
class Checkpoint:
    """A model to evaluate.

    Attributes:
        name: as in the results.
        path: its folder.
        words: that it has seen, for one by words; None for others.
        is_exported: whether the folder is one for transformers.
    """

    name: str
    path: Path
    words: float | None
    is_exported: bool

    def load(self, settings: BabylmSettings) -> TrainedModel:
        """The model, loaded as the command line says; raises as `TrainedModel.load`."""
        load = load_converted if self.is_exported else TrainedModel.load
        return load(ModelChoice(run=self.path, weights=settings.weights, device=settings.device))


def find_checkpoints(run: Path) -> list[Checkpoint]:
    """The models that a folder stands for: those by words, ascending, then the newest one, or the folder's own.

    Raises:
        InputError: there is none.
    """
    if (run / MODEL_CONFIG).is_file():
        return [Checkpoint(run.resolve().name, run, None, is_exported=False)]
    by_words = []
    for folder in list_word_checkpoints(run) or sorted(run.glob("chck_*")):
        is_exported = _is_exported(folder)
        words = words_in_name(folder.name)
        if words and (is_exported or (folder / MODEL_CONFIG).is_file()):
            by_words.append(Checkpoint(folder.name, folder, words, is_exported))
        else:
            log(f"{folder}: is left out, since {'it holds no model' if words else 'its name says no number of words'}")
    by_words.sort(key=lambda checkpoint: checkpoint.words or 0)
    if _is_exported(run):
        return [*by_words, Checkpoint(_MAIN, run, None, is_exported=True)]
    if by_words and not list_checkpoints(run):
        return by_words
    newest = newest_in(run)
    return [*by_words, Checkpoint(newest.name, newest, None, is_exported=False)]


def _is_exported(folder: Path) -> bool:
    return is_for_transformers(folder) and not (folder / MODEL_CONFIG).is_file()


def babylm(settings: BabylmSettings) -> None:
    """Evaluate, print the table, write the files.

    Raises:
        InputError: a flag, the data, a checkpoint or an output cannot be used.
    """
    checkpoints = find_checkpoints(settings.run)
    tasks, left_out = read_tasks(settings.data, settings.tasks)
    if "aoa" in tasks and not any(checkpoint.words for checkpoint in checkpoints):
        if settings.tasks:
            raise InputError(f"--tasks aoa: needs the checkpoints by words (chck_…), of which {settings.run} has none")
        left_out["aoa"] = "needs checkpoints by words (chck_…)"
        del tasks["aoa"]
        if not tasks:
            raise InputError(f"DATA {settings.data}: only has aoa, which {left_out['aoa']}")
    backends = list(dict.fromkeys(settings.backend or trained_backends(checkpoints[-1].path)))
    print(_plan(checkpoints, tasks, left_out, backends), flush=True)
    output = settings.output or _default_output(settings.run)
    is_drawn = can_draw() and tasks.keys() != {"aoa"}
    outputs = [output, output.with_suffix(".png")] if is_drawn else [output]
    if not can_draw():
        log(f"{output.with_suffix('.png')}: is not drawn without matplotlib (pip install matplotlib)")
    check_outputs(outputs, [file for task in tasks.values() for file in task.files])
    with staged_outputs(*outputs, what="--output") as staged:  # before the work, refuse what cannot be written
        evaluated = evaluate(settings, checkpoints, tasks, backends)
        report = {
            "pipeline": PIPELINE,
            "data": str(settings.data),
            "weights": settings.weights,
            "tasks": {name: {"folder": task.folder.name, "items": len(task.content)} for name, task in tasks.items()},
            "left_out": left_out,
            "unknown_tokens": evaluated.unknown,
            "checkpoints": evaluated.checkpoints,
            "aoa": evaluated.acquisition,
        }
        staged[0].write_text(json.dumps(_finite(report), indent=2, ensure_ascii=False) + "\n", "utf-8")
        if is_drawn:
            _draw(staged[1], checkpoints, evaluated, f"{settings.run}, {settings.weights} weights")
    print(f"\n{evaluated.tables()}\n\n{'; '.join(evaluated.closing)}\nwrote {' and '.join(map(str, outputs))}")
    for note in evaluated.notes:
        log(note)


def _default_output(run: Path) -> Path:
    run = run.absolute()
    return run.with_name(f"{run.name}_babylm.json") if (run / MODEL_CONFIG).is_file() else run / "babylm.json"


def trained_backends(path: Path) -> list[str]:
    """The backends that the model in a folder was trained for, by its settings; causal and mntp if they do not say."""
    settings = settings_if_any(path)
    masked, of = settings.get("hybrid_numerator"), settings.get("hybrid_denominator")
    is_known = type(masked) is int and type(of) is int and of > 0
    if is_known and masked in {0, of}:
        return ["mntp"] if masked else ["causal"]
    return ["causal", "mntp"]


@dataclass(frozen=True)
class Evaluated:
    """Results.

    Attributes:
        backends: their names.
        checkpoints: for each its name, path, words and results by backend and task.
        acquisition: of all checkpoints by words, by backend; empty without the task.
        unknown: the share of unknown tokens.
        closing: parts of the last line: unknown tokens, ties.
        notes: warnings to be shown below.
    """

    backends: list[str]
    checkpoints: list[dict[str, Any]]
    acquisition: dict[str, Any]
    unknown: float
    closing: list[str]
    notes: list[str]

    def scores(self, backend: str) -> list[dict[str, float]]:
        """Each checkpoint's scores by task, of which reading has two."""
        return [_scores(checkpoint["results"][backend]) for checkpoint in self.checkpoints]

    def tables(self) -> str:
        """For one checkpoint a column per backend; for several a table per backend."""
        scores = {backend: self.scores(backend) for backend in self.backends}
        names = list(next(iter(scores.values()))[0])
        parts = []
        if names and len(self.checkpoints) == 1:
            rows = [[name, *(_shown(scores[backend][0][name]) for backend in self.backends)] for name in names]
            parts.append(table([["task", *self.backends], *rows]))
        elif names:
            for backend, of_checkpoints in scores.items():
                rows = [
                    [checkpoint["name"], *(_shown(each[name]) for name in names)]
                    for checkpoint, each in zip(self.checkpoints, of_checkpoints, strict=True)
                ]
                parts.append(table([[backend, *names], *rows]))
        if self.acquisition:
            rows = [
                [backend, f"{result['words']:,}", _shown(result["score"])]
                for backend, result in self.acquisition.items()
            ]
            parts.append(table([["age of acquisition", "words", "correlation"], *rows]))
        return "\n\n".join(parts)


def evaluate(
    settings: BabylmSettings, checkpoints: Sequence[Checkpoint], tasks: Mapping[str, Task], backends: list[str]
) -> Evaluated:
    """Score all tasks by each checkpoint and backend, with a progress bar; raises as `TrainedModel.load`."""
    acquisition: Any = tasks["aoa"].content if "aoa" in tasks else None
    aoa_scores: dict[str, list[np.ndarray]] = {backend: [] for backend in backends}
    ties: dict[str, list[tuple[float, str]]] = {backend: [] for backend in backends}
    evaluated, notes, unknown = list[dict[str, Any]](), list[str](), 0.0
    encoded: tuple[str, dict[str, list[Passage]]] = ("", {})
    with tqdm(unit="token", unit_scale=True, delay=0.5) as bar:
        for checkpoint in checkpoints:
            trained = checkpoint.load(settings)
            with prefix_errors(str(checkpoint.path)):
                if encoded[0] != trained.tokenizer.to_str():  # those of a run have one tokenizer
                    encoded = (trained.tokenizer.to_str(), _encode(trained, tasks))
                    unknown = max(unknown, _unknown(trained, encoded[1]))
                    unknown_line(unknown, "DATA")  # before the work, refuse a tokenizer that cannot be meant
                    bar.total = bar.n + len(backends) * _work(encoded[1], checkpoints[len(evaluated) :])
                notes = [f"{checkpoint.name}: {trained.note}"] if trained.note else notes  # the last is the best
                results: dict[str, dict[str, Any]] = {backend: {} for backend in backends}
                for backend, name in product(backends, encoded[1]):
                    if name == "aoa" and checkpoint.words is None:
                        continue
                    passages, content = encoded[1][name], tasks[name].content
                    scores = score_passages(trained.model, passages, backend, settings.batch_tokens, bar.update)
                    if isinstance(content, Acquisition):
                        aoa_scores[backend].append(scores)
                    else:
                        results[backend][name] = content.results(scores)
                for backend, of_tasks in results.items():
                    ties[backend].append(most_tied(of_tasks))
            evaluated.append(
                {"name": checkpoint.name, "path": str(checkpoint.path), "words": checkpoint.words, "results": results}
            )
    seen = [checkpoint.words for checkpoint in checkpoints if checkpoint.words is not None]
    of_ages = {backend: acquisition.results(aoa_scores[backend], seen) for backend in backends} if acquisition else {}
    closing = [unknown_line(unknown, "DATA")]
    if any(isinstance(task.content, Choices) and name not in _WUGS for name, task in tasks.items()):
        closing += [right_ties_line(*max(ties[backend]), backend) for backend in backends]
    return Evaluated(backends, evaluated, of_ages, unknown, closing, [*notes, *_undefined(evaluated, of_ages)])


def _encode(trained: TrainedModel, tasks: Mapping[str, Task]) -> dict[str, list[Passage]]:
    """The passages of each task."""
    passages = {}
    for name, task in tasks.items():
        with prefix_errors(str(task.folder)):
            passages[name] = task.content.passages(trained.tokenizer)
    return passages


def _unknown(trained: TrainedModel, encoded: Mapping[str, Sequence[Passage]]) -> float:
    ids = [np.array(passage.ids[1:]) for passages in encoded.values() for passage in passages]
    return unknown_share(trained.tokenizer, ids)


def _work(encoded: Mapping[str, Sequence[Passage]], checkpoints: Sequence[Checkpoint]) -> int:
    """The number of predictions by one backend."""
    by_words = sum(checkpoint.words is not None for checkpoint in checkpoints)
    return sum(
        num_scored(passages) * (by_words if name == "aoa" else len(checkpoints)) for name, passages in encoded.items()
    )


def most_tied(results: Mapping[str, Any]) -> tuple[float, str]:
    """The largest share of tied items of a task that chooses, and its name; a small task counts like a large one."""
    return max(((result["ties"], name) for name, result in results.items() if "ties" in result), default=(0.0, ""))


def _scores(results: Mapping[str, Any]) -> dict[str, float]:
    scores: dict[str, float] = {}
    for name, result in results.items():
        if name == "reading":
            scores |= {part: result[part] for part in ("eye_tracking", "self_paced")}
        else:
            scores[name] = result["score"]
    return scores


def _undefined(evaluated: Sequence[Mapping[str, Any]], acquisition: Mapping[str, Any]) -> list[str]:
    """Lines about scores that are no numbers, and about one that stands for nothing."""
    lines = []
    for checkpoint in evaluated:
        for backend, results in checkpoint["results"].items():
            if names := [name for name, score in _scores(results).items() if not math.isfinite(score)]:
                where = f"{checkpoint['name']}, {backend}: {', '.join(names)}"
                lines.append(f"{where}: not defined (too few items, or all values are the same)")
    for backend, result in acquisition.items():
        if result["words"] < 3:
            lines.append(f"{backend}: aoa is 0 by definition, since fewer than three words have both ages")
    return lines


def _plan(
    checkpoints: Sequence[Checkpoint], tasks: Mapping[str, Task], left_out: Mapping[str, str], backends: Sequence[str]
) -> str:
    """What will be evaluated."""
    rows = [["task", "items", "folder"]]
    rows += [[name, f"{len(task.content):,}", task.folder.name] for name, task in tasks.items()]
    lines = [table(rows), *(f"left out: {name} ({reason})" for name, reason in left_out.items())]
    shown = ", ".join(checkpoint.name for checkpoint in checkpoints)
    return "\n".join([*lines, f"by {' and '.join(backends)}, of {shown}"])


def _draw(file: Path, checkpoints: Sequence[Checkpoint], evaluated: Evaluated, title: str) -> None:
    numbered = enumerate(checkpoint.words for checkpoint in checkpoints)
    by_words = {index: words for index, words in numbered if words is not None}
    scores = {backend: evaluated.scores(backend) for backend in evaluated.backends}
    if len(by_words) > 1:
        curves = {backend: [values[index] for index in by_words] for backend, values in scores.items()}
        draw_curves(file, list(by_words.values()), curves, title)
    else:
        draw_bars(file, {backend: values[-1] for backend, values in scores.items()}, title)


def _shown(score: float) -> str:
    return f"{score:.2f}" if math.isfinite(score) else "–"


def _finite(value: Any) -> Any:
    """A value for JSON, with null for what is no number."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main() -> None:
    """Entry point."""
    run_command(BabylmSettings, babylm)


if __name__ == "__main__":
    main()
