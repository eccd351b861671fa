"""Weights in files that others wrote: of any format, in any dictionaries, with any prefixes of their names.

What such files say twice is compared: tensors under two names, files side by side, an index and its files.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gptbert.errors import InputError, first_line, listed
from gptbert.io.formats import format_of
from gptbert.io.json_file import read_object
from gptbert.io.screen import log
from gptbert.io.torch_file import load_torch_file
from gptbert.upstream import is_published, same, to_published, unwrapped_name, upstream_name

State = dict[str, Tensor]  # by name in upstream's layout
_Found = dict[str, tuple[str, Tensor]]  # by the same name: a tensor's key in the file, and the tensor

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # as transformers names them; `.index.json` if in parts
_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt"}
_NOT_WEIGHTS = re.compile(r"training_args|optimizer|scheduler|rng_state|scaler|training_state")  # of other trainers
_AVERAGE = re.compile(r"(^|[_.])(ema|avg|average|averaged|shadow|swa)([_.]|$)", re.IGNORECASE)
_OPTIMIZER = re.compile(r"(^|[_.])(optim|optimizer|exp_avg|exp_avg_sq|momentum_buffer|grad|grads|gradients)([_.]|$)")
_DEEPEST = 6  # dictionaries in dictionaries
_MOST_ENTRIES = 1_000_000
_MOST_FILES = 10_000  # looked at for a message
_LONGEST_NAME = 8  # parts of a published name, at most
_PART = re.compile(r"(.+)-\d+-of-\d+(\.\w+)")


@dataclass(frozen=True)
class ForeignWeights:
    """The weights of a file, and what was not taken from it.

    Attributes:
        model: the weights.
        ema: their moving average; the weights themselves if the file has no average.
        left_out: keys that are no weights of a GPT-BERT: heads for other tasks, counters of wrappers, optimizers.
        model_keys: what the file calls each weight.
        ema_keys: the same of the average.
    """

    model: State
    ema: State
    left_out: list[str]
    model_keys: dict[str, str]
    ema_keys: dict[str, str]


def find_weights(folder: Path) -> list[Path]:
    """The files of weights in a folder: those with transformers' names, all of them, or else the only other one.

    Raises:
        InputError: there is none, or there are several with other names.
    """
    usual = [folder / f"{name}{part}" for name in WEIGHT_FILES for part in ("", ".index.json")]
    if found := [file for file in usual if file.is_file()]:
        if unread := [file.name for file in sorted(folder.iterdir()) if _is_weights(file) and not _is_of(file, found)]:
            log(f"{folder}: takes {listed([file.name for file in found], 4)}, not {listed(unread, 4)} beside it")
        return found
    others = sorted(filter(_is_weights, folder.iterdir()))
    if not others:
        raise InputError(f"{folder}: holds neither {' nor '.join(WEIGHT_FILES)}{_what_is_there(folder)}")
    if part := next(filter(None, map(index_of, others)), None):
        raise InputError(f"{folder}: holds weights in parts ({others[0].name}) without their index, {part.name}")
    if len(others) > 1:
        names = ", ".join(file.name for file in others[:5])
        raise InputError(f"{folder}: holds several files that may be the weights ({names}); name one of them")
    return others


def index_of(file: Path) -> Path | None:
    """The index of the weights that a file is a part of, by its name, such as model-00001-of-00002.safetensors."""
    part = _PART.fullmatch(file.name)
    return file.with_name(f"{part[1]}{part[2]}.index.json") if part else None


def _is_of(file: Path, found: list[Path]) -> bool:
    """Whether a file is one of these, or a part of them."""
    return file in found or index_of(file) in found


def _what_is_there(folder: Path) -> str:
    """The folder inside with weights, as in the hub's cache; or else the files that are there."""
    inside = islice(chain(folder.glob("*/*"), folder.glob("*/*/*")), _MOST_FILES)
    if found := sorted({str(file.parent.relative_to(folder)) for file in inside if _is_weights(file)}):
        return f"; weights are in {listed(found, 3)}: name that folder"
    names = sorted(file.name for file in folder.iterdir())
    return f" (it has {listed(names, 5)}); name the file of weights" if names else " (it is empty)"


def _is_weights(file: Path) -> bool:
    return file.is_file() and file.suffix in _SUFFIXES and not _NOT_WEIGHTS.search(file.name)


def read_foreign(files: list[Path], key: str | None = None) -> ForeignWeights:
    """The weights of a file; of several, those that all of them hold.

    Args:
        files: at least one.
        key: which weights of a file to take if it holds several that differ, as the message names them.

    Raises:
        InputError: a file is damaged or of another format, holds no weights or several that differ, or files differ.
    """
    all_read = [_read(file, key) for file in files]
    for file, other in zip(files[1:], all_read[1:], strict=True):
        if difference := _difference(all_read[0].model, other.model) or _difference(all_read[0].ema, other.ema):
            raise InputError(f"{files[0]} and {file.name} differ in {difference}; name the file that is meant")
    return all_read[0]


def _read(file: Path, key: str | None) -> ForeignWeights:
    try:
        content = _read_index(file) if file.name.endswith(".index.json") else _read_any(file)
        return _search(content, key)
    except (InputError, SafetensorError, OSError) as error:
        raise InputError(f"{file}: {first_line(error)}") from error


def _search(content: Any, key: str | None) -> ForeignWeights:
    """The weights in what a file holds."""
    if not isinstance(content, dict):
        raise InputError("expected a dictionary of weights")
    loose: list[str] = []
    found = list(_candidates(content, loose, [_MOST_ENTRIES]))
    if not found:
        raise InputError(f"holds no weights of a GPT-BERT{_description(content)}")
    return _choose(found, key, loose)


def _read_any(file: Path) -> Any:
    """The content of a file, recognized by its first bytes."""
    if not file.is_file():  # reading a pipe or device may never end
        raise InputError("no such file")
    with file.open("rb") as handle:
        start = handle.read(32)
    if start[:2] == b"PK":
        return load_torch_file(file)
    if start[8:9] == b"{":  # behind its length
        return load_file(file)
    if known := format_of(start) or ("JSON and no file of weights" if start[:1] == b"{" else None):
        raise InputError(f"is {known}")
    if file.suffix == ".safetensors":
        return load_file(file)  # which says why it is none
    return load_torch_file(file)  # which says why it is none


def _read_index(index: Path) -> State:
    """The tensors of several files, which an index lists; they must be exactly those."""
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError("has no weight_map of names and files")
    state: State = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise InputError(f"names {name[:100]!r}, which is not a file beside it")
        try:
            content = _read_any(index.with_name(name))
        except (InputError, SafetensorError, OSError) as error:
            raise InputError(f"its file {name}: {first_line(error)}") from error
        expected = {key for key, file in weight_map.items() if file == name}
        if not isinstance(content, dict) or (wrong := expected.symmetric_difference(content)):
            about = f"differ in {min(map(str, wrong))[:100]}" if isinstance(content, dict) else "differ"
            raise InputError(f"it and its file {name} {about}")
        state |= content
    return state


def _candidates(
    content: Mapping[Any, Any], loose: list[str], left: list[int], path: tuple[str, ...] = ()
) -> Iterator[tuple[str, _Found]]:
    """Each set of a GPT-BERT's weights in nested dictionaries, with the keys and prefixes that lead to it.

    Args:
        content: the dictionary.
        loose: receives the keys of what is beside such sets.
        left: one number, of entries to look at; a file may hold a dictionary many times, and in itself.
        path: keys that lead to the dictionary.
    """
    left[0] -= len(content) + 1
    if left[0] < 0:
        raise InputError("its dictionaries have more entries than a file of weights")
    has_own_names = any("blocks" in str(key).split(".") for key in content)  # of this trainer's model
    groups: dict[str, _Found] = {}
    unknown = []
    for key, value in content.items():
        if isinstance(value, Mapping) and len(path) < _DEEPEST and not _OPTIMIZER.search(str(key)):
            yield from _candidates(value, loose, left, (*path, str(key)))
        elif isinstance(key, str) and isinstance(value, Tensor):
            prefix, name = _parse(key, has_own_names)
            if name is None:
                unknown.append((prefix, key, value))
            elif _OPTIMIZER.search(prefix):
                loose.append(key)
            else:
                raw, tensor = groups.setdefault(prefix, {}).setdefault(name, (key, value))
                if not same(tensor, value):
                    raise InputError(f"{raw} and {key} are the same weight, and differ")
        elif not path or _holds_tensors(value):  # inside of dictionaries there may be millions of others
            loose.append(".".join((*path, str(key))))
    _assign(unknown, groups, loose)
    for prefix, group in groups.items():
        yield ".".join(filter(None, (*path, prefix))), group


def _holds_tensors(value: Any) -> bool:
    """Whether a value is a list of tensors, as some averages are saved."""
    return isinstance(value, list | tuple) and any(isinstance(each, Tensor) for each in value[:4])


def _assign(unknown: list[tuple[str, str, Tensor]], groups: dict[str, _Found], loose: list[str]) -> None:
    """Add tensors of unknown names to the weights that they are among, for a message; or their keys to `loose`."""
    for name, key, tensor in unknown:
        owner = max((prefix for prefix in groups if not prefix or name.startswith(f"{prefix}.")), key=len, default=None)
        if owner is None or tensor.ndim == 0:
            loose.append(key)
        else:
            groups[owner][upstream_name(name.removeprefix(f"{owner}.") if owner else name)] = (key, tensor)


def _parse(key: str, has_own_names: bool) -> tuple[str, str | None]:
    """A name's prefix without wrappers, and its name in upstream's layout; without one, the name unwrapped and None."""
    bare = unwrapped_name(key)
    parts = bare.split(".")[-_LONGEST_NAME:]
    for start in range(len(parts)):
        name = ".".join(parts[start:])
        published = upstream_name(name)
        if not is_published(published):
            published = (to_published(name) if has_own_names else None) or ""
        if published:
            return bare.removesuffix(name).removesuffix("."), published
    return bare, None


def _choose(found: list[tuple[str, _Found]], key: str | None, loose: list[str]) -> ForeignWeights:
    """The weights and their average among what a file holds, by what is in it and what it is called."""
    if key is not None:
        named = [state for label, state in found if label == key]
        if not named:
            raise InputError(f"--weights_key {key}: the file has {_names(found)}")
        found = [("", named[0])]
    averages = [(label, state) for label, state in found if _AVERAGE.search(label)]
    models = [one for one in found if one not in averages] or averages
    chosen = []
    for several in (models, averages or models):
        for label, state in several[1:]:
            if difference := _difference(_tensors(several[0][1]), _tensors(state)):
                raise InputError(
                    f"holds {_names(several)}, which differ in {difference}; --weights_key names the one that is meant"
                    if label
                    else f"holds {_names(several)}, which differ in {difference}; write the weights alone to a file"
                )
        chosen.append(several[0][1])
    left_out = [name for name in chosen[0] if name.startswith("head.")] + loose
    weights = [{name: state[name] for name in state if not name.startswith("head.")} for state in chosen]
    keys = [{name: key for name, (key, _) in state.items()} for state in weights]
    return ForeignWeights(_tensors(weights[0]), _tensors(weights[1]), left_out, keys[0], keys[1])


def _names(found: list[tuple[str, _Found]]) -> str:
    return " and ".join(repr(label[:60]) if label else "weights without a key" for label, _ in found[:4])


def _tensors(found: _Found) -> State:
    return {name: tensor for name, (_, tensor) in found.items()}


def _difference(one: State, other: State) -> str | None:
    """The first name in which two sets of weights differ."""
    names = [name for name in [*one, *(name for name in other if name not in one)] if not name.startswith("head.")]
    return next(
        (name for name in names if name not in one or name not in other or not same(one[name], other[name])), None
    )


def _description(content: Mapping[Any, Any]) -> str:
    """The first names in a file without weights of a GPT-BERT, for a message."""
    names = ", ".join(repr(str(name)[:60]) for name in list(content)[:3])
    return f" (it has {names}{', …' if len(content) > 3 else ''})" if names else " (it is empty)"
