"""`training_state.pt` of a checkpoint: read, and refused if the trainer could not resume from it."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptbert.errors import InputError
from gptbert.io.torch_file import load_torch_file
from gptbert.model.objective import Objective

STATE_KEYS = ("step", "optimizer", "rank_states", "skipped_steps", "mask_counts", "is_compiled", "progress")
_LATER_KEYS = {"is_compiled", "progress"}  # not written by earlier versions
_LARGEST_STEP = 10**9
_MUONS = "momentum_buffer"


def read_training_state(path: Path, weights: Mapping[str, Tensor], optimizer: str) -> dict[str, Any]:
    """The step, optimizer state, rank states, masking history and progress (unchecked), on the CPU.

    Args:
        path: the file.
        weights: the model's, by name; the optimizer's moments have their shapes.
        optimizer: a value of `--optimizer`.

    Raises:
        InputError: names the file and the reason.
    """
    try:
        state = load_torch_file(path)
        _check(state, weights, optimizer)
    except InputError as error:
        raise InputError(f"{path.name}: {error}") from error
    return state


def _check(state: Any, weights: Mapping[str, Tensor], optimizer: str) -> None:
    if type(state) is not dict or set(state) | _LATER_KEYS != set(STATE_KEYS):
        raise InputError(f"expected the keys {', '.join(STATE_KEYS)}")
    if type(state["step"]) is not int or not 0 <= state["step"] <= _LARGEST_STEP:
        raise InputError("its step is not a number of steps")
    _check_optimizer(state["optimizer"], weights, is_muon=optimizer == "muon")
    if type(state["rank_states"]) is not list or not all(map(_is_rank_state, state["rank_states"])):
        raise InputError("its rank states have an unexpected form")
    skipped = state["skipped_steps"]
    if not isinstance(skipped, Tensor) or skipped.dtype != torch.int64 or skipped.shape != (3,):
        raise InputError("its skipped steps have an unexpected form")
    if type(state.get("is_compiled")) not in {bool, type(None)}:
        raise InputError("its is_compiled is neither a boolean nor None")
    counts = state["mask_counts"]
    if counts is not None and not _is_bytes(counts):
        raise InputError("its masking history has an unexpected form")


def _check_optimizer(optimizer: Any, weights: Mapping[str, Tensor], *, is_muon: bool) -> None:
    """Either each parameter has a dictionary of numbers and of tensors of its shape, or no parameter has one."""
    if type(optimizer) is not dict or type(optimizer.get("state")) is not dict:
        raise InputError("its optimizer state is of another form")
    names = {"step", "exp_avg", "exp_avg_sq"} if weights else {"step"}  # for LAMB and AdamW; moments may be in shards
    kinds = [set(), names, {_MUONS}] if is_muon else [set(), names]
    shapes: dict[str, Counter[torch.Size]] = {}
    for index, values in optimizer["state"].items():
        if type(index) is not int or type(values) is not dict or set(values) not in kinds:
            raise InputError("its optimizer state is of another form")
        for name, value in values.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                if value.ndim or name != "step":
                    shapes.setdefault(name, Counter())[value.shape] += 1
            elif name != "step" or type(value) not in {int, float}:
                raise InputError(f"its optimizer state has a {str(name)[:20]!r} that is not a tensor of numbers")
    expected = Counter(tensor.shape for tensor in weights.values())
    matrices = shapes.pop(_MUONS, Counter())  # the remaining moments belong to the other parameters
    if any(found + matrices != expected for found in shapes.values()) or (matrices and not shapes):
        raise InputError("its optimizer state has tensors of other shapes than the weights")


def _is_rank_state(state: Any) -> bool:
    """Whether a value is one rank's random state and sums, as `Trainer.save` gathers them."""
    if type(state) is not dict or set(state) != {"random", "sums"} or type(state["random"]) is not dict:
        return False
    generators, sums = state["random"], state["sums"]
    return (
        "cpu" in generators
        and all(map(_is_bytes, generators.values()))
        and generators["cpu"].shape == torch.get_rng_state().shape
        and isinstance(sums, Tensor)
        and sums.is_floating_point()
        and sums.shape == (len(Objective), 4)
    )


def _is_bytes(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.uint8 and value.ndim == 1
