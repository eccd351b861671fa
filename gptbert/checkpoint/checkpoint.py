"""Checkpoints: written atomically, the newest few kept, each sufficient to resume bit for bit.

run folder/checkpoints/step_00001000/
    model.safetensors        weights, under the published names (upstream's tools load them)
    ema.safetensors          their moving average, likewise
    training_state.pt        optimizer, step, every rank's random state and sums, skipped steps, masking history, and
                             what the run has trained on (gptbert.data.progress)
    model_config.json        the model's shape, as --config_file reads it
    train_config.json        the run's settings
    tokenizer.json
    manifest.json            size and digest of each file; a checkpoint that lacks or contradicts it is damaged

With `--parallel fsdp`, `shards/` holds weights, average and moments instead, one file per rank (see shards.py).
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.tensor import DTensor

from gptbert.checkpoint import manifest
from gptbert.checkpoint.folder import (
    checkpoint_dir,
    differences,
    is_sharded,
    read_settings,
    step_of_name,
    write_settings,
)
from gptbert.checkpoint.kept import delete_leftovers, delete_old
from gptbert.checkpoint.shards import check_shards, load_shards, save_shards
from gptbert.checkpoint.training_state import STATE_KEYS, read_training_state
from gptbert.checkpoint.weights import read_weights, write_weights
from gptbert.config import ModelConfig, TrainConfig
from gptbert.data.progress import check_state as check_progress
from gptbert.distributed.world import World
from gptbert.errors import InputError, first_line
from gptbert.io.files import publish
from gptbert.io.names import MODEL_CONFIG, SHARDS, TRAINING_STATE

WAY_OUT = "delete its folder, and --resume auto takes the one before"


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint, except configuration and tokenizer.

    Attributes:
        step: steps completed, hence the next step's number; every schedule is a function of it.
        model: weights, named as in `GPTBert`.
        ema: their moving average.
        optimizer: its state_dict.
        rank_states: per rank, the random state ("random") and the sums since the last record ("sums").
        skipped_steps: `SkippedSteps.counts`.
        mask_counts: `MaskHistory.counts`, or None if it is off.
        is_compiled: whether the run was compiled; None in checkpoints of versions that did not record it.
        progress: `Progress.state_dict`; None likewise.
        shards: folder of a loaded sharded checkpoint's tensors (model, average, moments), which are still empty here;
            see `with_shards_loaded`.
    """

    step: int
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Any]
    rank_states: list[dict[str, Any]]
    skipped_steps: Tensor
    mask_counts: Tensor | None
    is_compiled: bool | None = None
    progress: dict[str, Any] | None = None
    shards: Path | None = None

    @property
    def is_sharded(self) -> bool:
        """Whether the tensors are sharded."""
        return any(isinstance(tensor, DTensor) for tensor in self.model.values())

    def with_shards_loaded(
        self, model: dict[str, Tensor], ema: dict[str, Tensor], moments: dict[int, dict[str, Tensor]]
    ) -> "Checkpoint":
        """Read `shards`, if there are any, into these tensors, full or sharded in any way; every rank must call it.

        Raises:
            InputError: files are damaged, or shapes differ.
        """
        if self.shards is None:
            return self
        load_shards(_named(model, ema, moments), self.shards)
        state = {index: values | moments[index] for index, values in self.optimizer["state"].items()}
        return replace(self, model=model, ema=ema, optimizer=self.optimizer | {"state": state}, shards=None)


def save(checkpoint: Checkpoint, config: TrainConfig, model_config: ModelConfig, world: World) -> Path:
    """Write a checkpoint under a temporary name, fsync, rename; then delete old ones (`delete_old`).

    Every rank must call it. The main rank writes full tensors; each rank writes its part of sharded ones.

    Returns:
        The checkpoint's folder.

    Raises:
        InputError: writing fails; earlier checkpoints are untouched.
    """
    final = checkpoint_dir(config.run_dir, checkpoint.step)
    temporary, shards = final.with_name(f".{final.name}.incomplete"), {}
    moments, rest = _moments_apart(checkpoint.optimizer)  # empty if the moments are not sharded
    try:
        world.on_main(_write, replace(checkpoint, optimizer=rest), final, temporary, config, model_config)
        if checkpoint.is_sharded:
            with world.errors_on_all_ranks(), _write_errors(final):
                tensors = _named(checkpoint.model, checkpoint.ema, moments)
                shards = save_shards(tensors, temporary / SHARDS, world)
        world.on_main(_publish, shards, final, temporary, config)
    except InputError:
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def load(path: Path, model_config: ModelConfig) -> Checkpoint:
    """Read a checkpoint onto the CPU, except a sharded one's tensors.

    Raises:
        InputError: something is missing or damaged, the model's shape differs from `model_config`, or the folder's name
            says another step than its content.
    """
    saved_config = ModelConfig.from_json(path / MODEL_CONFIG)
    shards = path / SHARDS if is_sharded(path) else None
    weights: dict[str, Any] = {"model": {}, "ema": {}}
    try:
        if shards is None:
            weights = {name: read_weights(path / f"{name}.safetensors", saved_config) for name in weights}
        else:
            check_shards(shards)
        state = read_training_state(path / TRAINING_STATE, weights["model"], read_settings(path).get("optimizer", ""))
        if state.get("progress") is not None:
            check_progress(state["progress"])
        checkpoint = Checkpoint(**weights, **state, shards=shards)
    except InputError as error:
        raise InputError(f"--resume {path}: the checkpoint is damaged ({error}); {WAY_OUT}") from error
    if (named := step_of_name(path)) not in {None, checkpoint.step}:
        raise InputError(
            f"--resume {path}: its name says step {named}, and its {TRAINING_STATE} step {checkpoint.step}; rename the "
            "folder, after its content"
        )
    if changes := differences(saved_config, model_config):
        raise InputError(f"--resume {path}: its model differs from --config_file: {changes}")
    return checkpoint


@contextmanager
def _write_errors(final: Path) -> Iterator[None]:
    """Turn write errors of the OS and of libraries into one that names the checkpoint."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, InputError) as error:
        reason, free = first_line(error), ""
        if isinstance(error, OSError):
            reason = f"{error.strerror or reason}: {error.filename}" if error.filename else error.strerror or reason
        if not isinstance(error, FileNotFoundError | PermissionError):
            free = f"; {shutil.disk_usage(final.parents[1]).free / 1e6:,.1f} MB are free there"
        raise InputError(f"checkpoint {final}: cannot be written ({reason}){free}") from error


def _write(
    checkpoint: Checkpoint, final: Path, temporary: Path, config: TrainConfig, model_config: ModelConfig
) -> None:
    """Write all files except the shards and the manifest."""
    with _write_errors(final):
        delete_leftovers(temporary.parent)
        temporary.mkdir(parents=True)
        state = {key: getattr(checkpoint, key) for key in STATE_KEYS}
        if checkpoint.is_sharded:
            (temporary / SHARDS).mkdir()
        else:
            for name, weights in (("model", checkpoint.model), ("ema", checkpoint.ema)):
                write_weights(temporary / f"{name}.safetensors", weights, model_config)
        torch.save(state, temporary / TRAINING_STATE)
        write_settings(temporary, config, model_config)


def _publish(shards: dict[str, manifest.Entry], final: Path, temporary: Path, config: TrainConfig) -> None:
    """Write the manifest, give the folder its name, and delete old ones."""
    with _write_errors(final):
        manifest.write(temporary, {f"{SHARDS}/{name}": entry for name, entry in shards.items()})
        publish(temporary, final)
        delete_old(final, config)


def _moments_apart(optimizer: dict[str, Any]) -> tuple[dict[int, dict[str, Tensor]], dict[str, Any]]:
    """The sharded part of an optimizer's state by parameter, and its state_dict without that part."""
    moments: dict[int, dict[str, Tensor]] = {
        index: {name: value for name, value in values.items() if isinstance(value, DTensor)}
        for index, values in optimizer["state"].items()
    }
    rest = {
        index: {name: value for name, value in values.items() if name not in moments[index]}
        for index, values in optimizer["state"].items()
    }
    return moments, optimizer | {"state": rest}


def _named(
    model: dict[str, Tensor], ema: dict[str, Tensor], moments: dict[int, dict[str, Tensor]]
) -> dict[str, Tensor]:
    """All tensors under their names in the shards."""
    return {
        **{f"model.{name}": tensor for name, tensor in model.items()},
        **{f"ema.{name}": tensor for name, tensor in ema.items()},
        **{f"{name}.{index}": tensor for index, values in moments.items() for name, tensor in values.items()},
    }
