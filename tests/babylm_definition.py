"""What BabyLM's evaluation computes, plainly: one text at a time, without padding, in fp64, by normal equations."""

import csv
import json
import math
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from gptbert.model import GPTBert
from gptbert.text.special_tokens import MASK_ID
from tests.babylm_data import MEASURES


class Definition:
    """A model and the tokenizer of its exported folder: `<s>` in front, `<mask>` in a text is one."""

    def __init__(self, model: GPTBert, tokenizer: Tokenizer, backend: str) -> None:
        self.model, self.tokenizer, self.backend = model.double(), tokenizer, backend
        self._known: dict[tuple[str, int], float] = {}

    def log_probabilities(self, rows: list[list[int]]) -> torch.Tensor:
        """[rows, T, V]."""
        ids = torch.tensor(rows)
        with torch.no_grad():
            hidden_states = self.model.encode(ids, torch.zeros_like(ids), self.backend == "causal")
            return self.model.logits(hidden_states).log_softmax(-1)

    def completion(self, text: str, completion: str) -> float:
        """Log-probability of a text's end."""
        self.tokenizer.encode_special_tokens = False
        encoding = self.tokenizer.encode(text)
        ids, start = encoding.ids, len(text) - len(completion)
        chosen = [index for index, (_, end) in enumerate(encoding.offsets) if end > start]
        if self.backend == "causal":
            (table,) = self.log_probabilities([ids])
            return sum(table[index - 1, ids[index]].item() for index in chosen)
        rows = [[MASK_ID if at == index else token for at, token in enumerate(ids)] for index in chosen]
        tables = self.log_probabilities(rows)
        back = 1 if self.backend == "mntp" else 0
        return sum(table[index - back, ids[index]].item() for table, index in zip(tables, chosen, strict=True))

    def choice(self, texts: list[str], completions: list[str]) -> bool:
        """Whether the first text is the likeliest, ties included."""
        scores = np.float32([self.completion(*each) for each in zip(texts, completions, strict=True)])
        return int(scores.argmax()) == 0

    def word(self, sentence: str, word: str) -> float:
        """Surprisal of a word behind a sentence."""
        self.tokenizer.encode_special_tokens = False
        first, *others = self.tokenizer.encode(word, add_special_tokens=False).ids
        total = self._next(sentence, first)
        sentence += self.tokenizer.decode([first], skip_special_tokens=False)
        for token in others:
            text = self.tokenizer.decode([token], skip_special_tokens=False)
            total += self._next(sentence, self.tokenizer.encode(text, add_special_tokens=False).ids[0])
            sentence += text
        return -total

    def _next(self, sentence: str, token: int) -> float:
        if (sentence, token) not in self._known:
            masks = "" if self.backend == "causal" else "<mask>" * 3
            (table,) = self.log_probabilities([self.tokenizer.encode(sentence + masks).ids])
            place = {"causal": -1, "mntp": -4, "mlm": -3}[self.backend]
            self._known[sentence, token] = table[place, token].item()
        return self._known[sentence, token]


def lines(folder: Path) -> list[tuple[str, dict]]:
    """The lines of a folder's files, with the files' stems."""
    files = sorted(folder.glob("*.jsonl"))
    return [(file.stem, json.loads(line)) for file in files for line in file.read_text().splitlines()]


def choices(task: str, folder: Path) -> list[tuple[str, list[str], list[str]]]:
    """Group, texts and completions of each item."""
    items = []
    for stem, line in lines(folder):
        if task in {"blimp", "supplement"}:
            texts = [line["sentence_good"], line["sentence_bad"]]
            items.append((line.get("UID", stem), texts, texts))
        elif task == "ewok":
            ends = [" " + line["Target1"], " " + line["Target2"]]
            items.append((line["Domain"], [line["Context1"] + end for end in ends], ends))
        elif task == "entity_tracking":
            texts = [line["input_prefix"] + option for option in line["options"]]
            items.append((f"{stem}_{line['numops']}_ops", texts, line["options"]))
        elif task == "comps":
            end, prefixes = line["property_phrase"], (line["prefix_acceptable"], line["prefix_unacceptable"])
            group = {"": "base", "s": "wugs", "s_dist-before": "wugs_dist_before"}.get(
                stem.removeprefix("comps_wug").replace("comps_base", ""), "wugs_dist_in_between"
            )
            items.append((group, [f"{prefix} {end}" for prefix in prefixes], [end, end]))
    return items


def accuracies(task: str, folder: Path, definition: Definition) -> tuple[float, dict[str, float]]:
    """The score in percent, and that of each group."""
    by_group: dict[str, list[bool]] = {}
    for group, texts, completions in choices(task, folder):
        by_group.setdefault(group, []).append(definition.choice(texts, completions))
    groups = {group: 100 * np.mean(right) for group, right in by_group.items()}
    if task != "entity_tracking":
        return np.mean(list(groups.values())), groups
    splits = [[value for group, value in groups.items() if group.startswith(s)] for s in ("regular", "ambiref")]
    return np.mean([np.mean(values) for values in splits]), groups


def wug(folder: Path, definition: Definition) -> float:
    """Spearman's rho by Pearson's of ranks, which are counted."""
    shares, ratios = [], []
    for _, line in lines(folder):
        one, other = (definition.completion(text, text) for text in line["sentences"].split("\t"))
        shares.append(1 / (1 + math.exp(other - one)))
        ratios.append(line["ratio"])
    ranks = [[sum(x < y for x in v) + (sum(x == y for x in v) + 1) / 2 for y in v] for v in (shares, ratios)]
    return np.corrcoef(ranks)[0, 1]


def reading(file: Path, definition: Definition) -> tuple[float, float, dict[str, tuple[float, float]]]:
    """Both scores, and each measure's R² without and with the surprisal, without spillover."""
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    for row in rows:
        row["pred"] = definition.word(row["item"] or "None", row["word"])
        row["prev_pred"] = definition.word(row["prev_item"], row["prev_word"]) if row["prev_item"] else "NA"
    base = ["Subtlex_log10", "length", "context_length"]
    alone = {name: r_squares(rows, name, base) for name in MEASURES}
    gains = [100 * (b - a) / (1 - a) for name, (a, b) in alone.items() if "RT" in name]
    without, with_it = r_squares(rows, "self_paced_reading_time", [*base, "prev_length", "prev_pred"])
    return np.mean(gains), 100 * (with_it - without) / (1 - without), alone


def r_squares(rows: list[dict], measure: str, names: list[str]) -> tuple[float, float]:
    """R² without and with the surprisal, by normal equations on centered columns."""
    complete = [row for row in rows if all(row[name] not in {"", "NA"} for name in [measure, *names])]
    values = np.array([[float(row[name]) for name in [*names, "pred", measure]] for row in complete])
    *columns, surprisal, y = values.T
    terms = [*columns, *(one * other for one, other in combinations(columns, 2))]
    return r_squared(terms, y), r_squared([*terms, surprisal], y)


def r_squared(terms: list[np.ndarray], y: np.ndarray) -> float:
    """The share of y's variance that a fit explains."""
    x = np.stack([(term - term.mean()) / term.std() for term in terms], axis=1)
    y = y - y.mean()
    fitted = x @ np.linalg.solve(x.T @ x, x.T @ y)
    return 1 - np.sum((y - fitted) ** 2) / np.sum(y**2)


def acquired(seen: np.ndarray, surprisals: np.ndarray) -> float | None:
    """A model's age of acquisition, the curve found by searching a grid of b and c ever more finely."""
    x, y = np.log10(seen + 1), -surprisals
    centers, widths = (0.0, x.mean()), (3.0, 2.0)  # of log b and of c
    for _ in range(40):
        steepness, middles = (np.linspace(m - w, m + w, 25) for m, w in zip(centers, widths, strict=True))
        grid = np.stack(np.meshgrid(steepness, middles, indexing="ij"), -1).reshape(-1, 2)
        slopes = np.clip(np.exp(grid[:, :1]) * (x - grid[:, 1:]), -700, 700)
        curves = 1 / (1 + np.exp(-slopes))  # [grid, points]
        centered = curves - curves.mean(axis=1, keepdims=True)
        heights = centered @ y / np.maximum(np.sum(centered**2, axis=1), 1e-12)
        squares = np.sum((y - y.mean() - heights[:, None] * centered) ** 2, axis=1)
        best = int(squares.argmin())
        centers, widths = grid[best], tuple(width * 0.7 for width in widths)
    a, b, c = heights[best], math.exp(grid[best, 0]), grid[best, 1]
    d = y.mean() - a * curves[best].mean()
    height = -(math.log2(300_000) + surprisals.min()) / 2
    if not (a > 0 and d < height < a + d):
        return None
    age = c - math.log(a / (height - d) - 1) / b
    return age if x[0] <= age <= x[-1] else None
