"""The model of a checkpoint, sharded or not, as commands after training load it."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptbert.checkpoint import manifest
from gptbert.checkpoint.folder import is_sharded, newest_in, read_settings, saved_step, training_state_values
from gptbert.checkpoint.shards import check_shards, load_shards
from gptbert.checkpoint.weights import read_weights, shapes
from gptbert.config import ModelConfig
from gptbert.errors import InputError
from gptbert.io.json_file import read_object
from gptbert.io.names import MANIFEST, MODEL_CONFIG, SHARDS, TOKENIZER, WORDS
from gptbert.io.screen import log
from gptbert.model import GPTBert
from gptbert.schedules import MOST_INITIAL, initial_share


def load_model(path: Path, weights: str = "ema") -> GPTBert:
    """A checkpoint's model in eval mode, on the CPU.

    Args:
        path: a checkpoint's folder, or a run's for its newest checkpoint.
        weights: "ema" or "model".

    Raises:
        InputError: the checkpoint is missing or damaged.
    """
    path = newest_in(Path(path))
    config = ModelConfig.from_json(path / MODEL_CONFIG)
    require_weights(path, weights, "; --weights {other} takes that")
    try:  # before memory is allocated for the model
        state = read_full_weights(path, weights, config)
    except InputError as error:
        raise InputError(f"{path}: the checkpoint is damaged ({error})") from error
    model = GPTBert(config)
    model.load_state_dict(state)
    return model.eval()


def note_on_average(path: Path) -> str:
    """A warning if a checkpoint's average still has much of the initial weights, which looks like a fault; else "".

    Args:
        path: a checkpoint's folder.
    """
    step = saved_step(path)
    with suppress(InputError, KeyError, TypeError, ValueError, OverflowError):
        decay = float(read_settings(path)["ema_decay"])
        if step and (share := initial_share(decay, step)) > MOST_INITIAL:
            return (
                f"warning: after {step} steps the average of the weights still has {share:.0%} of the initial "
                f"ones (--ema_decay {decay:g}); --weights model takes the weights themselves"
            )
    return ""


def tokens_seen(path: Path) -> int | None:
    """Tokens that a checkpoint's run was trained on by its step; None if the checkpoint does not say.

    Records say it too, but only at their own steps.
    """
    tokens = _progress(path).get("tokens")
    with suppress(InputError):
        if (path / WORDS).is_file():
            tokens = read_object(path / WORDS).get("tokens")
    return tokens if type(tokens) is int and tokens >= 0 else None


def corpora_seen(path: Path) -> set[str]:
    """Digests (`gptbert.data.progress.corpus_digest`) of what a checkpoint's run was trained on.

    Empty if the checkpoint does not say.
    """
    corpora = _progress(path).get("corpora")
    listed = corpora if isinstance(corpora, list) else []
    return {str(corpus.get("digest")) for corpus in listed if isinstance(corpus, dict)}


def _progress(path: Path) -> dict[str, Any]:
    """What a checkpoint's training state says of its run's progress; empty if it has none."""
    progress = None
    with suppress(InputError):
        progress = training_state_values(path).get("progress")
    return progress if isinstance(progress, dict) else {}


def read_full_weights(path: Path, weights: str, config: ModelConfig) -> dict[str, Tensor]:
    """Full weights of a checkpoint, sharded or not, checked against its manifest like the tokenizer beside them.

    Args:
        path: the checkpoint's folder.
        weights: "ema" or "model".
        config: its model's shape.

    Raises:
        InputError: a file's name, and what is wrong with it.
    """
    require_weights(path, weights)
    if not is_sharded(path):
        _check(path, [MODEL_CONFIG, f"{weights}.safetensors"])
        return read_weights(path / f"{weights}.safetensors", config)
    entries = manifest.read(path)
    _check_listed(path, [name for name in entries if name == MODEL_CONFIG or name.startswith(f"{SHARDS}/")])
    check_shards(path / SHARDS)
    state = {name: torch.empty(shape) for name, shape in shapes(config).items()}
    load_shards({f"{weights}.{name}": tensor for name, tensor in state.items()}, path / SHARDS)
    return state


def require_weights(path: Path, weights: str, hint: str = "") -> None:
    """Refuse a folder without the file of these weights that has the other one.

    Args:
        path: the folder.
        weights: "ema" or "model".
        hint: the way on, for the message; `{other}` in it is the other name.

    Raises:
        InputError: names both files.
    """
    other = "model" if weights == "ema" else "ema"
    files = {name: path / f"{name}.safetensors" for name in (weights, other)}
    if not is_sharded(path) and not files[weights].exists() and files[other].is_file():
        way_on = hint.format(other=other)
        raise InputError(f"{path}: has no {files[weights].name}, only {files[other].name}{way_on}")


def _check(path: Path, names: list[str]) -> None:
    """Check files against the folder's manifest; a complete folder that someone else wrote may have none."""
    if (path / MANIFEST).exists() or path.name.endswith((".incomplete", ".deleted")):
        _check_listed(path, names)
    else:
        log(f"{path}: has no {MANIFEST}, so its files are taken as they are")


def _check_listed(path: Path, names: list[str]) -> None:
    """Check files that the manifest must have, and the tokenizer, if it and its digest are there."""
    has_tokenizer = TOKENIZER in manifest.read(path) and (path / TOKENIZER).exists()
    manifest.check(path, [*names, TOKENIZER] if has_tokenizer else names)
