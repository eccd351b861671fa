"""BabyLM's choices between texts: BLiMP, its supplement, EWoK, entity tracking, COMPS and WUG.

They are read and counted as in its evaluation. The first text of an item is the right one. An item counts as right if
no other text has a higher score, so ties count as right. Scores are compared in fp32, as the evaluation has them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from gptbert.errors import InputError
from gptbert.io.files import visible_files
from gptbert.scoring.correlation import spearman
from gptbert.scoring.passages import Passage, completions
from gptbert.text.documents import label_field, parse_json, string_field
from gptbert.text.lines import file_lines

GROUP = "UID"  # the groups whose accuracies a task's score is the mean of
_SPLITS = ("regular", "ambiref", "move_contents")  # of entity tracking: the mean over each, then over these
_COMPS = {"comps_base": "base", "comps_wugs": "wugs", "comps_wugs_dist-before": "wugs_dist_before"}


@dataclass(frozen=True)
class Choice:
    """An item: texts of which a model should find the first likelier than the others.

    Attributes:
        texts: at least two.
        starts: for each text the number of characters that are its context, which is not scored.
        groups: by field, the group that the item counts in; `GROUP` is always there.
        ratio: of WUG, the share of people who chose the first text; None otherwise.
    """

    texts: tuple[str, ...]
    starts: tuple[int, ...]
    groups: dict[str, str]
    ratio: float | None = None


@dataclass(frozen=True)
class Choices:
    """A task's items.

    Attributes:
        task: its name in `READERS`.
        items: at least one.
    """

    task: str
    items: Sequence[Choice]

    def __len__(self) -> int:
        """Number of items."""
        return len(self.items)

    def passages(self, tokenizer: Tokenizer) -> list[Passage]:
        """All texts, item by item."""
        texts = [text for item in self.items for text in item.texts]
        return completions(tokenizer, texts, [start for item in self.items for start in item.starts])

    def results(self, scores: np.ndarray) -> dict[str, Any]:
        """The task's score and its parts, from the log-probabilities of `passages`.

        Accuracies are in percent. WUG's score is 100 times the rank correlation of two shares of the first text: the
        model's, by a softmax over the texts, and people's.
        """
        ends = np.cumsum([len(item.texts) for item in self.items])
        scored = [torch.from_numpy(part).float() for part in np.split(scores, ends[:-1])]
        if self.task.startswith("wug"):
            shares = [float(part.softmax(0)[0]) for part in scored]
            ratios: list[Any] = [item.ratio for item in self.items]
            return {"score": 100 * spearman(shares, ratios)}
        is_right = np.array([bool(part[0] == part.max()) for part in scored])
        ties = [bool((part == part.max()).sum() > 1) for part in scored]
        groups = {field: self._accuracies(field, is_right) for field in self._fields()}
        return {"score": self._mean(groups[GROUP]), "ties": sum(ties) / len(ties), "groups": groups}

    def _fields(self) -> list[str]:
        """The fields that all items have."""
        return [field for field in self.items[0].groups if all(field in item.groups for item in self.items)]

    def _accuracies(self, field: str, is_right: np.ndarray) -> dict[str, float]:
        members: dict[str, list[int]] = {}
        for index, item in enumerate(self.items):
            members.setdefault(item.groups[field], []).append(index)
        return {value: 100 * float(is_right[chosen].mean()) for value, chosen in members.items()}

    def _mean(self, accuracies: dict[str, float]) -> float:
        if self.task != "entity_tracking":
            return sum(accuracies.values()) / len(accuracies)
        by_split = [[value for name, value in accuracies.items() if name.startswith(split)] for split in _SPLITS]
        means = [sum(values) / len(values) for values in by_split if values]
        return sum(means) / len(means)


def read_choices(task: str, folder: Path) -> Choices:
    """Read a task's items, the `.jsonl` files of a folder, sorted by name.

    Raises:
        InputError: a line is not an item, or there is none; names file and line.
    """
    items = []
    for file in visible_files(folder, "*.jsonl"):
        for number, line in file_lines(file):
            if not line.strip():
                continue
            try:
                values = parse_json(line)
                if not isinstance(values, dict):
                    raise ValueError("is no JSON object")  # noqa: TRY004, TRY301  a bad line, not a bug
                items.append(READERS[task](values, file.stem))
            except ValueError as error:
                raise InputError(f"{file}:{number}: {error}") from None
    if not items:
        raise InputError(f"{folder}: its .jsonl files hold no items")
    if task == "entity_tracking" and not any(item.groups[GROUP].startswith(_SPLITS) for item in items):
        raise InputError(f"{folder}: expected files named after {', '.join(_SPLITS)}, of which the score is the mean")
    return Choices(task, items)


def _minimal_pair(values: dict[str, Any], stem: str) -> Choice:
    """BLiMP's; in its supplement the file's name is the group."""
    texts = tuple(_text(values, name) for name in ("sentence_good", "sentence_bad"))
    groups = {GROUP: label_field(values, GROUP) if GROUP in values or "field" in values else stem}
    for field in ("field", "linguistics_term"):
        if field in values:
            groups[field] = label_field(values, field).replace("syntax_semantics", "syntax/semantics")
    return Choice(texts, (0, 0), groups)


def _ewok(values: dict[str, Any], _: str) -> Choice:
    """Which target follows the first context; items with the other context are lines of their own."""
    context = string_field(values, "Context1")
    texts = tuple(f"{context} {_text(values, name)}" for name in ("Target1", "Target2"))
    others = {"context_type": "ContextType", "context_contrast": "ContextDiff", "target_contrast": "TargetDiff"}
    groups = {name: label_field(values, field) for name, field in others.items() if field in values}
    return Choice(texts, (len(context),) * 2, {GROUP: label_field(values, "Domain"), **groups})


def _entity_tracking(values: dict[str, Any], stem: str) -> Choice:
    """Which option follows; grouped by the file and the number of operations."""
    prefix, options = string_field(values, "input_prefix"), values.get("options")
    if not isinstance(options, list) or len(options) < 2:
        raise ValueError("`options` is no array of at least two texts")
    named = {f"options[{index}]": option for index, option in enumerate(options)}
    texts = tuple(prefix + _text(named, name) for name in named)
    return Choice(texts, (len(prefix),) * len(texts), {GROUP: f"{stem}_{label_field(values, 'numops')}_ops"})


def _comps(values: dict[str, Any], stem: str) -> Choice:
    """Behind which prefix the property is likelier."""
    prefixes = [string_field(values, name) for name in ("prefix_acceptable", "prefix_unacceptable")]
    phrase = _text(values, "property_phrase")
    texts = tuple(f"{prefix} {phrase}" for prefix in prefixes)
    return Choice(
        texts, tuple(len(prefix) + 1 for prefix in prefixes), {GROUP: _COMPS.get(stem, "wugs_dist_in_between")}
    )


def _wug(values: dict[str, Any], _: str) -> Choice:
    """Sentences with two forms of an invented word, and the share of people who chose the first."""
    texts = tuple(string_field(values, "sentences").split("\t"))
    if len(texts) < 2 or not all(map(str.strip, texts)):
        raise ValueError("`sentences` is no pair of sentences with a tab between them")
    try:
        ratio = float(values.get("ratio", math.nan))
    except (TypeError, ValueError, OverflowError):
        ratio = math.nan
    if not math.isfinite(ratio):
        raise ValueError("`ratio` is no number")
    return Choice(texts, (0,) * len(texts), {GROUP: "wug"}, ratio)


def _text(values: dict[str, Any], name: str) -> str:
    """A text that is scored, so not empty: it would be likelier than any other."""
    text = string_field(values, name)
    if not text.strip():
        raise ValueError(f"`{name}` is empty, which would be likelier than any text")
    return text


READERS: dict[str, Callable[[dict[str, Any], str], Choice]] = {
    "blimp": _minimal_pair,
    "supplement": _minimal_pair,
    "ewok": _ewok,
    "entity_tracking": _entity_tracking,
    "comps": _comps,
    "wug_adj": _wug,
    "wug_past": _wug,
}  # by task: an item from a line's object and the stem of its file's name
