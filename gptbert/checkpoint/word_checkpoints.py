"""Checkpoints by words seen: `RUN/words/chck_1M` and so on, under BabyLM's names, never deleted.

Words are those counted by the tokenizing step (`TokenStore.num_words`), spread evenly over an epoch's tokens; repeated
text counts again. A threshold's weights are those of the first step that has seen as many words. A folder is written
before the checkpoint of its step: a run that resumes from an earlier checkpoint passes the same threshold and rewrites
identical files; a folder of a later step that it will not rewrite is set aside. A threshold that a run had passed
before the checkpoint that it goes on from gets no folder, since its weights are gone.
"""

import re
from decimal import Decimal
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from gptbert.checkpoint import manifest
from gptbert.checkpoint.folder import list_word_checkpoints, saved_step, write_settings
from gptbert.checkpoint.weights import write_weights
from gptbert.config import ModelConfig, TrainConfig
from gptbert.data.progress import Progress
from gptbert.distributed.world import World
from gptbert.errors import InputError
from gptbert.io.files import move_away
from gptbert.io.json_file import write_json
from gptbert.io.names import WORD_CHECKPOINTS, WORDS
from gptbert.io.outputs import new_folder
from gptbert.model import GPTBert

BABYLM = tuple(10**6 * millions for millions in (*range(1, 10), *range(10, 100, 10), *range(100, 1001, 100)))
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


class WordCheckpoints:
    """Counts the words seen at a step, and saves weights by them.

    Attributes:
        thresholds: numbers of words that get a folder from the run's first step, or its checkpoint, on; ascending.

    Raises:
        InputError: a value of `--checkpoint_words` is not a number of words or is more than the run will see, or a
            token file does not record its number of words.
    """

    def __init__(self, config: TrainConfig, progress: Progress) -> None:
        self._config = config
        self._progress = progress
        self.thresholds: list[int] = []
        self._passed: list[int] = []
        if not config.checkpoint_words:
            return
        seen = progress.words_before(config.max_steps)
        if seen is None:
            raise InputError(
                "--checkpoint_words: a token file that this run trains on, or did before its checkpoint, does not say "
                "how many words it holds; tokenize the corpus again"
            )
        chosen = {words: value for value in config.checkpoint_words for words in _parse(value)}
        for words, value in chosen.items():
            if words > seen and value.lower() != "babylm":
                raise InputError(
                    f"--checkpoint_words {value}: the run sees {seen:,} words in --max_steps {config.max_steps}"
                )
        before = progress.words_before(progress.first_step) or 0
        self._passed = sorted(words for words in chosen if words <= before)
        self.thresholds = sorted(words for words in chosen if before < words <= seen)

    def forecast(self) -> str:
        """A line for the log: what the run will save from here on."""
        names = " ".join(map(checkpoint_name, self.thresholds)) or "no folder"
        before = self._progress.words_before(self._progress.first_step)
        parts = [
            f"of the {self._progress.words_before(self._config.max_steps):,} words that the run sees",
            f", {before:,} of them before this start" if before else "",
            f": {names} in words/",
        ]
        folder = self._config.run_dir / WORD_CHECKPOINTS
        if gone := [name for name in map(checkpoint_name, self._passed) if not (folder / name).is_dir()]:
            parts.append(f"; passed before this start, so not written: {' '.join(gone)}")
        return "".join(parts)

    def set_aside(self) -> list[str]:
        """Rename the folders of steps that the run has yet to train again and will not write again; lines on them.

        They are of a course that the run has left, as after a kill, if `--checkpoint_words` has changed since.
        """
        again, lines = {checkpoint_name(words) for words in self.thresholds}, []
        for folder in list_word_checkpoints(self._config.run_dir):
            step = saved_step(folder)
            if folder.name not in again and step is not None and step > self._progress.first_step:
                aside = move_away(folder, f"left_{folder.name}")
                lines.append(f"{folder}: of step {step}, after the one that this run goes on from; now {aside.name}")
        return lines

    def record(self, step: int) -> dict[str, float]:
        """The words of a training record after `step` steps; empty if a token file does not say."""
        words = self._progress.words_before(step)
        return {} if words is None else {"train/words": words}

    def due(self, step: int) -> list[int]:
        """The thresholds reached after `step` steps, but not a step earlier."""
        if not self.thresholds or step <= self._progress.first_step:
            return []
        before, seen = (self._progress.words_before(number) or 0 for number in (step - 1, step))
        return [words for words in self.thresholds if before < words <= seen]

    def save(self, step: int, model: GPTBert, ema: GPTBert, model_config: ModelConfig, world: World) -> None:
        """Write a folder for each threshold due after `step` steps; every rank must call it.

        `saved_model.load_model` reads such a folder, whether or not the run is sharded.

        Raises:
            InputError: writing fails; existing folders are untouched.
        """
        on_main = StateDictOptions(full_state_dict=True, cpu_offload=True)  # other ranks hold a tensor at a time
        models = {"model": model, "ema": ema}
        weights: Any = {name: get_model_state_dict(each, options=on_main) for name, each in models.items()}
        for words in self.due(step):
            final = self._config.run_dir / WORD_CHECKPOINTS / checkpoint_name(words)
            world.on_main(self._write, final, step, weights, model_config)

    def _write(self, final: Path, step: int, weights: dict[str, dict[str, Tensor]], model_config: ModelConfig) -> None:
        with new_folder(final, "checkpoint", replace=True) as folder:
            for name, tensors in weights.items():
                write_weights(folder / f"{name}.safetensors", tensors, model_config)
            write_settings(folder, self._config, model_config)
            seen = {"words": self._progress.words_before(step), "tokens": self._progress.plan.tokens_before(step)}
            write_json(folder / WORDS, {"step": step, **seen})
            manifest.write(folder)


def checkpoint_name(words: int) -> str:
    """BabyLM's name: chck_1M, chck_1000M; otherwise in thousands (chck_500K) if possible, else in full."""
    for unit in ("M", "K"):
        if words % _UNITS[unit] == 0:
            return f"chck_{words // _UNITS[unit]}{unit}"
    return f"chck_{words}"


def _parse(value: str) -> tuple[int, ...]:
    """The numbers of words that one value of the flag denotes."""
    if value.lower() == "babylm":
        return BABYLM
    match = re.fullmatch(r"([0-9][0-9_]{0,19}(?:\.[0-9]{1,9})?)([KMB]?)", value.upper(), flags=re.ASCII)
    words = Decimal(match[1].replace("_", "")) * _UNITS[match[2]] if match else Decimal(0)
    if words < 1 or words != int(words):
        raise InputError(
            f"--checkpoint_words {value}: expected babylm, or numbers of words such as 500_000, 1M, 1.5B or 20K"
        )
    return (int(words),)
