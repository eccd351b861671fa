"""What Apple's MPS would be asked for, noted on a CPU: operations that it lacks, and fp64, which it does not have."""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
import torchgen
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_TABLE = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"  # comes with PyTorch
_EVERYWHERE = r"CompositeExplicitAutograd\w*|CompositeImplicitAutograd\w*"
_WIDE = (torch.float64, torch.complex128)


@cache
def _table() -> dict[str, str]:
    """The entry of each operation in PyTorch's table of who implements what."""
    entries = re.split(r"^- func: ", _TABLE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return {entry[: entry.index("(")]: entry for entry in entries}


def is_on_mps(name: str) -> bool:
    """Whether PyTorch's table has an implementation for MPS, or one for all devices; `name` as in "add.Tensor"."""
    entry = _table()[name]
    if delegate := re.search(r"structured_delegate: (\S+)", entry):
        return is_on_mps(delegate[1])
    return "dispatch:" not in entry or bool(
        re.search(rf"^    [^\n]*\b(MPS|{_EVERYWHERE})\b[^\n]*:", entry, re.MULTILINE)
    )


class MpsWalk(TorchDispatchMode):
    """While entered, notes the operations that a device would be asked for, those inside of our own too.

    Results of `host`, and what is computed from them, are the host's, which has fp64.

    Attributes:
        names: all operations.
        wide: those that made fp64 on the device.
        has_factories: whether fp64 that is made from nothing is the host's.
    """

    def __init__(self, *, has_factories: bool = False) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.wide: set[str] = set()
        self.has_factories = has_factories

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name.startswith("kernels::"):
            with self:
                return OPDEFS[name]._init_fn(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        inputs, outputs = list(_tensors((args, kwargs))), list(_tensors(result))
        is_wide = any(tensor.dtype in _WIDE for tensor in outputs)
        if any(map(is_on_host, inputs)) or (is_wide and self.has_factories and _is_new(name, inputs)):
            for tensor in outputs:
                tensor.is_of_host = True
        elif name.startswith("aten::"):
            self.names.add(name.removeprefix("aten::") + (f".{func._overloadname}" * (func._overloadname != "default")))
            if is_wide:
                self.wide.add(name)
        return result


def to_host(tensor: Tensor) -> Tensor:
    """In place of `Tensor.cpu`: a copy that is known to be the host's."""
    copy = tensor.detach().clone()
    copy.is_of_host = True
    return copy


def is_on_host(tensor: Tensor) -> bool:
    """Whether a tensor is one of `to_host`, or computed from one."""
    return getattr(tensor, "is_of_host", False)


def _is_new(name: str, inputs: list[Tensor]) -> bool:
    return not inputs or name == "aten::lift_fresh"  # of `torch.tensor`


def _tensors(values: object) -> Iterator[Tensor]:
    return (value for value in tree_leaves(values) if isinstance(value, Tensor))
