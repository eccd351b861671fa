"""BabyLM's age of acquisition: whether a model learns words in the order in which children do.

As in its evaluation, after Chang & Bergen (2022, "Word acquisition in neural language models"): a sigmoid is fitted to
a word's negative surprisal in all its contexts over the logarithm of the words that the model has seen; the word is
acquired where the curve is halfway between chance, log2 of 300,000, and the lowest surprisal. (The evaluation takes
nats for the one and bits for the other, so this does too.) A child acquires it at the age where a sigmoid, fitted
to the share of children who know it, reaches one half. The score is the correlation of the two over all words that have
both, and 0 if these are fewer than three.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from gptbert.errors import InputError
from gptbert.io.json_file import read_json
from gptbert.scoring.correlation import pearson
from gptbert.scoring.csv_table import CsvTable
from gptbert.scoring.passages import Passage, completions
from gptbert.scoring.sigmoid import fit, place
from gptbert.text.documents import string

CONTEXTS, CHILDREN = "cdi_childes.json", "cdi_human.csv"
_AGES = range(16, 31)  # months
_CHANCE = math.log2(300_000)
_FEWEST = 3  # points of a curve, and words of a correlation
_MOST_BYTES = 1 << 28
_UNITS = {"": 1, "K": 1e3, "M": 1e6, "B": 1e9}


class Acquisition:
    """Words that children acquire at a known age, with contexts of each.

    Raises:
        InputError: a file cannot be read; names it, and the line or word.
    """

    def __init__(self, contexts: Path, children: Path) -> None:
        ages = _child_ages(children)
        self.ages: dict[str, float] = {}
        self._texts: list[str] = []
        self._starts: list[int] = []
        self._words: list[str] = []
        found = _contexts(contexts)
        self.num_contexts = sum(map(len, found.values()))
        for word, texts in found.items():
            if len(word) < 2 or word not in ages:
                continue  # the evaluation scores these, too, and leaves them out in the end
            self.ages[word] = ages[word]
            for text in texts:
                context = f"{text.strip()} "
                self._texts.append(context + word.strip())
                self._starts.append(len(context))
                self._words.append(word)

    def __len__(self) -> int:
        """Number of contexts in the file."""
        return self.num_contexts

    def passages(self, tokenizer: Tokenizer) -> list[Passage]:
        """All words in all contexts."""
        return completions(tokenizer, self._texts, self._starts)

    def results(self, scores: Sequence[np.ndarray], seen: Sequence[float]) -> dict[str, Any]:
        """The score and each word's ages, from the log-probabilities of `passages` by each checkpoint.

        Args:
            scores: [checkpoints] of [passages].
            seen: words that each checkpoint has seen, ascending.
        """
        table = -np.stack(list(scores))  # [checkpoints, passages]
        words = np.array(self._words)
        ages = {}
        for word, age in self.ages.items():
            surprisals = table[:, words == word]  # [checkpoints, contexts]
            times = np.repeat(np.array(seen, np.float64), surprisals.shape[1])
            if (acquired := model_age(times, surprisals.flatten())) is not None:
                ages[word] = {"model": acquired, "child": age}
        enough = len(ages) >= _FEWEST
        score = pearson(*([each[key] for each in ages.values()] for key in ("model", "child"))) if enough else 0.0
        return {"score": score, "words": len(ages), "ages": ages}


def words_in_name(name: str) -> float | None:
    """The words seen by a checkpoint of this name, such as chck_10M; None if it does not say."""
    match = re.search(r"(\d+(?:\.\d+)?)\s*([KMB]?)", name, re.IGNORECASE | re.ASCII)
    return float(match[1]) * _UNITS[match[2].upper()] if match else None


def model_age(seen: np.ndarray, surprisals: np.ndarray) -> float | None:
    """log10 of 1 + the words after which a model has acquired a word; None if it has not, or no curve fits.

    Args:
        seen: [points] words seen, ascending.
        surprisals: [points] in nats.
    """
    if len(surprisals) < _FEWEST:
        return None
    threshold = _CHANCE - 0.5 * (_CHANCE - surprisals.min())
    x, y = np.log10(seen + 1), -surprisals
    parameters = fit(x, y, [np.ptp(y), 1.0, x.mean(), y.min()])
    age = None if parameters is None else place(parameters, -threshold)
    return age if age is not None and x[0] <= age <= x[-1] else None


def child_age(ages: np.ndarray, shares: np.ndarray) -> float | None:
    """Months after which half of the children know a word; None if that is not within the ages.

    Args:
        ages: [points] in months, ascending.
        shares: [points] of children who know it, NaN where it is not known.
    """
    ages, shares = ages[~np.isnan(shares)], shares[~np.isnan(shares)]
    if len(ages) < _FEWEST:
        return None
    bounds = [0, 0, ages[0], -0.5], [2, 1, ages[-1], 0.5]
    parameters = fit(ages, shares, [1.0, 0.1, ages.mean(), 0.0], bounds)
    age = None if parameters is None else place(parameters, 0.5)
    return age if age is not None and ages[0] <= age <= ages[-1] else None


def _child_ages(file: Path) -> dict[str, float]:
    """The age of each word that has one; of a word's rows the first counts."""
    table = CsvTable(file)
    ages = [age for age in _AGES if str(age) in table.names]
    if not ages:
        raise InputError(f"{file}: has no columns for ages ({_AGES[0]}, {_AGES[1]}, … {_AGES[-1]})")
    shares = table.columns([str(age) for age in ages])
    found: dict[str, float | None] = {}
    for word, row in zip(table.cells("word"), shares, strict=True):
        if word not in found:
            found[word] = child_age(np.array(ages, np.float64), row)
    return {word: age for word, age in found.items() if age is not None}


def _contexts(file: Path) -> dict[str, list[str]]:
    """Texts in front of each word."""
    try:
        content = read_json(file, _MOST_BYTES)
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{file}: expected a JSON object, of words with their contexts")
    found = {}
    for word, contexts in content.items():
        try:
            if not isinstance(contexts, list) or not all(isinstance(each, dict) for each in contexts):
                raise ValueError("expected an array of objects")  # noqa: TRY301
            if not word.strip():
                raise ValueError("is no word")  # noqa: TRY301
            found[string(word, "the word")] = [string(each.get("context"), "`context`") for each in contexts]
        except ValueError as error:
            raise InputError(f"{file}: {word!r}: {error}") from None
    return found
