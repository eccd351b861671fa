"""`python -m gptbert.score RUN pairs.jsonl`: how often a model prefers the good sentence of minimal pairs.

A sentence's score is its log-likelihood under the causal objective or its pseudo-log-likelihood under the masked one,
both defined in `scoring.likelihood`. A pair counts as correct if its good sentence has the higher score; ties count
as wrong. Accuracy is reported over all pairs (micro) and as the mean over the groups of a field (macro); the mean over
`UID` is BLiMP's number.

BabyLM's evaluation counts ties as right, groups lines without `UID` by their file, scores only completions in its other
tasks, and takes means over groups alone: `gptbert.babylm` does as it does.

In Python, `gptbert.score(model, texts)` is `scoring.texts.score`.
"""

import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from tqdm import tqdm

from gptbert.command_line import make_callable, run_command
from gptbert.errors import InputError
from gptbert.io.outputs import check_outputs, staged_outputs
from gptbert.io.screen import table
from gptbert.scoring.closing import repeated_share, repeats_line, ties_line, unknown_line, unknown_share
from gptbert.scoring.likelihood import log_likelihoods, num_predictions
from gptbert.scoring.minimal_pairs import BLIMP_GROUP, Accuracy, MinimalPair, members, read_pairs
from gptbert.scoring.texts import OBJECTIVES
from gptbert.scoring.texts import score as score_texts
from gptbert.scoring.trained_model import ModelChoice, TrainedModel
from gptbert.text.encoding import encode_sentences

SWEEP = tuple(round(0.05 * step, 2) for step in range(10, 61))  # 0.5 … 3


@dataclass(frozen=True, kw_only=True)
class ScoreSettings(ModelChoice):
    """Score minimal pairs by causal log-likelihood and by masked next-token pseudo-log-likelihood."""

    pairs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PAIRS")]
    """JSONL files, or folders of them, with `sentence_good` and `sentence_bad` on each line, as in BLiMP."""
    group_by: tuple[str, ...] | None = None
    """Fields to group by, each separately. Default: UID, if all lines have it."""
    backend: tuple[Literal["causal", "mntp"], ...] = ("causal", "mntp")
    """causal: log-likelihood. mntp: masked next-token pseudo-log-likelihood, which needs one row per token."""
    temperature: tuple[float, ...] = (1.0,)
    """Numbers that divide the logits; if several, the best one is reported for each backend."""
    sweep: bool = False
    """Also try the temperatures 0.5, 0.55, … 3, from the same forward passes."""
    batch_tokens: int = 8192
    """Tokens that go through the model at once."""
    output: Path | None = None
    """JSON file for all results."""
    pairs_output: Path | None = None
    """JSONL file for the scores of every pair, at each backend's best temperature."""

    def __post_init__(self) -> None:
        for name in ("pairs", "backend", "temperature"):
            if not getattr(self, name):
                raise InputError(f"{'PAIRS' if name == 'pairs' else f'--{name}'}: needs at least one")
        for temperature in self.temperature:
            if not 0.01 <= temperature <= 100:
                raise InputError(f"--temperature is {temperature}, expected a number from 0.01 to 100")
        if self.batch_tokens < 1:
            raise InputError(f"--batch_tokens is {self.batch_tokens}, expected at least 1")
        if self.output and self.pairs_output and self.output.resolve() == self.pairs_output.resolve():
            raise InputError(f"--output and --pairs_output: are both {self.output}; name two files")


@dataclass(frozen=True)
class BackendScores:
    """Scores of all pairs by one backend.

    Attributes:
        temperatures: K of them.
        good: [pairs, K] fp64, of the good sentences at each temperature.
        bad: [pairs, K].
        accuracies: K of them.
    """

    temperatures: Sequence[float]
    good: np.ndarray
    bad: np.ndarray
    accuracies: list[Accuracy]

    @property
    def best(self) -> int:
        """Index of the best temperature; among ties, the one nearest to 1."""

        def quality(index: int) -> tuple[float, float]:
            return self.accuracies[index].headline, -abs(math.log(self.temperatures[index]))

        return max(range(len(self.temperatures)), key=quality)


def score_pairs(
    trained: TrainedModel,
    pairs: Sequence[MinimalPair],
    backends: Sequence[str] = tuple(OBJECTIVES),
    temperatures: Sequence[float] = (1.0,),
    batch_tokens: int = 8192,
) -> dict[str, BackendScores]:
    """Score pairs by each backend, "causal" or "mntp", at each temperature, with a progress bar."""
    sentences = [sentence for pair in pairs for sentence in (pair.good, pair.bad)]
    ids = encode_sentences(trained.tokenizer, sentences)
    results = {}
    with tqdm(total=num_predictions(ids) * len(backends), unit="token", unit_scale=True, delay=0.5) as bar:
        for backend in backends:
            objective = OBJECTIVES[backend]
            scores = log_likelihoods(trained.model, ids, objective, temperatures, batch_tokens, bar.update).numpy()
            good, bad = scores[0::2], scores[1::2]
            accuracies = [Accuracy.of(pairs, good[:, index], bad[:, index]) for index in range(len(temperatures))]
            results[backend] = BackendScores(temperatures, good, bad, accuracies)
    return results


def score(settings: ScoreSettings) -> None:
    """Score the pairs, print the tables, write the files.

    Raises:
        InputError: a flag, the pairs, the checkpoint or an output cannot be used.
    """
    temperatures = sorted({*settings.temperature, *(SWEEP if settings.sweep else ())})
    pairs = read_pairs(settings.pairs, settings.group_by)
    files = list(dict.fromkeys(pair.file for pair in pairs))
    outputs = [path for path in (settings.output, settings.pairs_output) if path]
    check_outputs(outputs, files)
    trained = TrainedModel.load(settings)
    with ExitStack() as stack:  # before the work, refuse outputs that cannot be written
        staged = {path: stack.enter_context(staged_outputs(path))[0] for path in outputs}
        backends = list(dict.fromkeys(settings.backend))
        unknown = unknown_share(trained.tokenizer, _ids(trained, pairs))
        repeated = repeated_share([(pair.good, pair.bad) for pair in pairs])
        closing = [unknown_line(unknown, "PAIRS"), repeats_line(repeated)]  # before the work, too
        results = score_pairs(trained, pairs, backends, temperatures, settings.batch_tokens)
        closing += [
            ties_line(scores.good[:, scores.best], scores.bad[:, scores.best], name) for name, scores in results.items()
        ]
        if settings.output:
            report = {
                "checkpoint": str(trained.path),
                "weights": settings.weights,
                "files": [str(file) for file in files],
                "num_pairs": len(pairs),
                "num_pairs_by_group": {field: _sizes(pairs, field) for field in pairs[0].groups},
                "unknown_tokens": unknown,
                "repeated_pairs": repeated,
                "backends": {name: _as_json(scores) for name, scores in results.items()},
            }
            staged[settings.output].write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", "utf-8")
        if settings.pairs_output:
            with staged[settings.pairs_output].open("w", encoding="utf-8") as file:
                for index, pair in enumerate(pairs):
                    line = _pair_as_json(pair, index, results)
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
    print(f"{trained.path}, {settings.weights} weights, {len(pairs):,} pairs")
    if len(temperatures) > 1:
        print(f"\n{_temperature_table(results, temperatures)}")
    for field in pairs[0].groups:
        print(f"\n{_group_table(pairs, field, results)}")
    print(f"\n{_total_table(pairs, results)}\n\n{'; '.join(closing)}")
    trained.explain()


def _ids(trained: TrainedModel, pairs: Sequence[MinimalPair]) -> list[np.ndarray]:
    """Token ids of all sentences, without `<s>`."""
    sentences = [sentence for pair in pairs for sentence in (pair.good, pair.bad)]
    return [np.array(ids[1:]) for ids in encode_sentences(trained.tokenizer, sentences)]


def _sizes(pairs: Sequence[MinimalPair], field: str) -> dict[str, int]:
    return {value: len(chosen) for value, chosen in members(pairs, field).items()}


def _as_json(scores: BackendScores) -> dict[str, Any]:
    return {
        "best_temperature": scores.temperatures[scores.best],
        "ties": float((scores.good[:, scores.best] == scores.bad[:, scores.best]).mean()),
        "temperatures": [
            {"temperature": temperature, "micro": accuracy.micro, "macro": accuracy.macro, "groups": accuracy.groups}
            for temperature, accuracy in zip(scores.temperatures, scores.accuracies, strict=True)
        ],
    }


def _pair_as_json(pair: MinimalPair, index: int, results: dict[str, BackendScores]) -> dict[str, Any]:
    line: dict[str, Any] = {"file": str(pair.file), "line": pair.line, **pair.groups}
    line |= {"sentence_good": pair.good, "sentence_bad": pair.bad}
    for backend, scores in results.items():
        good, bad = scores.good[index, scores.best].item(), scores.bad[index, scores.best].item()
        temperature = scores.temperatures[scores.best]
        line[backend] = {"temperature": temperature, "good": good, "bad": bad, "correct": good > bad}
    return line


def _temperature_table(results: dict[str, BackendScores], temperatures: Sequence[float]) -> str:
    """The criterion for each temperature, one column per backend; the best has a star."""
    rows = [["temperature", *results]]
    for index, temperature in enumerate(temperatures):
        cells = [
            f"{scores.accuracies[index].headline:.1%}{'*' if index == scores.best else ' '}"
            for scores in results.values()
        ]
        rows.append([f"{temperature:g}", *cells])
    return table(rows)


def _group_table(pairs: Sequence[MinimalPair], field: str, results: dict[str, BackendScores]) -> str:
    best = [scores.accuracies[scores.best] for scores in results.values()]
    rows = [[field, "pairs", *results]]
    for value, size in _sizes(pairs, field).items():
        rows.append([value, f"{size:,}", *(f"{accuracy.groups[field][value]:.1%}" for accuracy in best)])
    return table(rows)


def _total_table(pairs: Sequence[MinimalPair], results: dict[str, BackendScores]) -> str:
    best = [scores.accuracies[scores.best] for scores in results.values()]
    rows = [["accuracy", *results]]
    rows += [
        [f"mean over {field}" + (" (BLiMP's number)" if field == BLIMP_GROUP else ""), *cells]
        for field in pairs[0].groups
        for cells in [[f"{accuracy.macro[field]:.1%}" for accuracy in best]]
    ]
    rows.append([f"all {len(pairs):,} pairs", *(f"{accuracy.micro:.1%}" for accuracy in best)])
    rows.append(["at temperature", *(f"{scores.temperatures[scores.best]:g}" for scores in results.values())])
    return table(rows)


def main() -> None:
    """Entry point."""
    run_command(ScoreSettings, score)


make_callable(__name__, score_texts)

if __name__ == "__main__":
    main()
