"""BabyLM's reading task: how much a model's surprisal adds to what predicts the times that people take to read a word.

As in its evaluation (data and method of de Varda et al. 2023): each measure is regressed on the word's frequency, its
length and the length of its context, and all products of two of them, with and without the word's surprisal. With
spillover, the previous word's length and surprisal are there, too. A measure's figure is 100 · (R² with − R² without) /
(1 − R² without); the score for eye tracking is the mean over its four measures, without spillover, and that for
self-paced reading is its figure with spillover.

A surprisal is that of the word behind its sentence so far, from left to right. Backends that mask have three `<mask>`s
in place of what follows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from gptbert.errors import InputError
from gptbert.scoring.correlation import pearson
from gptbert.scoring.csv_table import CsvTable
from gptbert.scoring.passages import Passage, next_words, with_masks_behind

FILE = "reading_data.csv"
EYE_TRACKING = ("RTfirstfix", "RTfirstpass", "RTgopast", "RTrightbound")
SELF_PACED = "self_paced_reading_time"
MEASURES = (*EYE_TRACKING, SELF_PACED, "ELAN", "LAN", "N400", "P600", "EPNP", "PNP")
_PREDICTORS = ("Subtlex_log10", "length", "context_length")
_NUM_MASKS = 3  # one of which is the word's token


@dataclass(frozen=True)
class Regression:
    """A least-squares fit of y on a constant and columns.

    Attributes:
        r_squared: the share of the variance of y that it explains; NaN if it has no fewer terms than rows.
        aic: Akaike's criterion, of a normal likelihood.
        coefficient: of the last column.
        t_value: that, in its standard deviations.
    """

    r_squared: float
    aic: float
    coefficient: float
    t_value: float

    @classmethod
    def of(cls, columns: np.ndarray, y: np.ndarray) -> "Regression":
        """Fit columns [rows, terms] to y [rows]."""
        design = np.column_stack([np.ones(len(y)), columns])
        rows = len(y)
        if rows <= design.shape[1] or np.ptp(y) == 0:
            return cls(*[np.nan] * 4)
        weights, _, rank, _ = np.linalg.lstsq(design, y)
        squares = np.sum((y - design @ weights) ** 2)
        with np.errstate(divide="ignore"):  # a perfect fit
            deviation = np.sqrt(squares / (rows - rank) * np.sum(np.linalg.pinv(design)[-1] ** 2))
            aic = rows * (np.log(2 * np.pi * squares / rows) + 1) + 2 * rank
            values = 1 - squares / np.sum((y - y.mean()) ** 2), aic, weights[-1], weights[-1] / deviation
        return cls(*map(float, values))


class ReadingTimes:
    """The task's rows: words in their sentences, with the measures.

    Raises:
        InputError: the file is not such a table; names file, line or column.
    """

    def __init__(self, folder: Path) -> None:
        file = folder / FILE
        table = CsvTable(file)
        if not len(table):
            raise InputError(f"{file}: has no rows")
        self._measures = {name: table.numbers(name) for name in MEASURES}
        self._predictors = table.columns(_PREDICTORS)
        self._previous_length = table.numbers("prev_length")
        contexts = [text or "None" for text in table.texts("item")]  # as the evaluation has it
        previous = table.texts("prev_item")
        self._has_previous = np.array([text is not None for text in previous])
        self._contexts = contexts + [text for text in previous if text is not None]
        self._words = _words(table, file, "word", [True] * len(table))
        self._words += _words(table, file, "prev_word", self._has_previous)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._has_previous)

    def passages(self, tokenizer: Tokenizer) -> list[Passage]:
        """The tokens of all words, then of all previous words; masks behind them, which causal attention hides."""
        words = next_words(tokenizer, self._contexts, self._words)
        self._num_tokens = [len(passages) for passages in words]  # which `results` adds up
        return [with_masks_behind(passage, _NUM_MASKS - 1) for passages in words for passage in passages]

    def results(self, scores: np.ndarray) -> dict[str, Any]:
        """The scores and each measure's regressions, from the log-probabilities of `passages`."""
        firsts = np.cumsum([0, *self._num_tokens[:-1]])
        by_word = -np.add.reduceat(scores, firsts)
        surprisal, previous = by_word[: len(self)], np.full(len(self), np.nan)
        previous[self._has_previous] = by_word[len(self) :]
        alone = {name: self._compare(name, self._predictors, surprisal) for name in MEASURES}
        behind = np.column_stack([self._predictors, self._previous_length, previous])
        spillover = {name: self._compare(name, behind, surprisal) for name in MEASURES}
        gains = [alone[name]["gain"] for name in EYE_TRACKING]
        return {
            "eye_tracking": sum(gains) / len(gains),
            "self_paced": spillover[SELF_PACED]["gain"],
            "mean_surprisal": float(surprisal.mean()),
            "measures": alone,
            "measures_with_spillover": spillover,
        }

    def _compare(self, measure: str, predictors: np.ndarray, surprisal: np.ndarray) -> dict[str, float]:
        y = self._measures[measure]
        chosen = ~(np.isnan(y) | np.isnan(predictors).any(axis=1))
        products = [
            predictors[:, one] * predictors[:, other] for one, other in combinations(range(predictors.shape[1]), 2)
        ]
        columns = np.column_stack([predictors, *products, surprisal])[chosen]
        without, with_it = Regression.of(columns[:, :-1], y[chosen]), Regression.of(columns, y[chosen])
        gain, left = with_it.r_squared - without.r_squared, 1 - without.r_squared
        return {
            "rows": int(chosen.sum()),
            "r_squared_without": without.r_squared,
            "r_squared_with": with_it.r_squared,
            "gain": 100 * gain / left if left else np.nan,
            "coefficient": with_it.coefficient,
            "t_value": with_it.t_value,
            "aic_change": with_it.aic - without.aic,
            "correlation": pearson(surprisal[~np.isnan(y)], y[~np.isnan(y)]),
        }


def _words(table: CsvTable, file: Path, name: str, needed: Sequence[bool]) -> list[str]:
    """The words of a column in the rows that need one."""
    words = []
    for cell, line, is_needed in zip(table.cells(name), table.lines, needed, strict=True):
        if is_needed and not cell.strip():
            raise InputError(f"{file}:{line}: {name} is empty, expected a word")
        if is_needed:
            words.append(cell)
    return words
