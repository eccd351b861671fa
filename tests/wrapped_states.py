"""State dicts as others save them: random wrappers, containers and parameters, and what they say twice."""

import collections
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from gptbert.config import ModelConfig
from gptbert.upstream import TIED_WEIGHT, to_upstream

WRAPPERS = ("module.", "_orig_mod.", "model.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
OTHER_NAMES = ("net.", "lm.bert.", "encoder.")
CONTAINERS = ("model", "state_dict", "module", "model_state_dict", "checkpoint", "anything")
EMBEDDING = "embedding.word_embedding.weight"


@dataclass(frozen=True)
class Wrapped:
    """A file's content.

    Attributes:
        content: what torch.save is given.
        model: the weights in it, under the trainer's own names.
        disagrees: whether it says something twice that differs.
    """

    content: Any = field(repr=False)
    model: dict[str, Tensor] = field(repr=False)
    disagrees: bool


@st.composite
def wrapped_states(draw: st.DrawFn, state: dict[str, Tensor], config: ModelConfig) -> Wrapped:
    """A model's state_dict in any wrapping, with or without a contradiction."""
    is_own = draw(st.booleans())
    saved = dict(state) if is_own else to_upstream(state, config)
    if not is_own and draw(st.booleans()):
        del saved[draw(st.sampled_from([TIED_WEIGHT, EMBEDDING]))]
    disagrees = False
    kind = draw(st.sampled_from(["none", "tied", "buffer", "prefix", "container"]))
    changed = draw(st.sampled_from(sorted(saved)))
    other = saved | {changed: _changed(saved[changed])}
    if kind == "tied" and {TIED_WEIGHT, EMBEDDING} <= saved.keys():
        saved, disagrees = saved | {TIED_WEIGHT: _changed(saved[TIED_WEIGHT])}, True
    elif kind == "buffer" and (buffers := [name for name in saved if name.endswith("position_indices")]):
        name = draw(st.sampled_from(buffers))
        saved, disagrees = saved | {name: _changed(saved[name])}, True
    part = draw(st.sampled_from(["", *WRAPPERS]))
    saved = {re.sub(r"((?:layers|blocks)\.\d+\.)", rf"\1{part}", name): tensor for name, tensor in saved.items()}
    prefix = "".join(draw(st.lists(st.sampled_from(WRAPPERS), max_size=3)) + draw(st.lists(
        st.sampled_from(OTHER_NAMES), max_size=1)))  # fmt: skip
    saved = {f"{prefix}{name}": tensor for name, tensor in saved.items()}
    if kind == "prefix":
        saved, disagrees = saved | {f"module.{prefix}{name}": tensor for name, tensor in other.items()}, True
    if draw(st.booleans()):
        saved = {
            name: torch.nn.Parameter(tensor, requires_grad=draw(st.booleans()))
            if tensor.is_floating_point()
            else tensor
            for name, tensor in saved.items()
        }
    content = collections.OrderedDict(saved) if draw(st.booleans()) else saved
    keys = draw(st.lists(st.sampled_from(CONTAINERS), max_size=3))
    for key in keys:
        content = {key: content, "epoch": 3}
    if kind == "container":
        content, disagrees = {"first": content, "second": {"more": other}}, True
    return Wrapped(content, state, disagrees)


def _changed(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[0] += 1
    return tensor
