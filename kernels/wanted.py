"""The fused operations that this process uses where they can run.

None by default, since each is compiled anew for some sizes, which takes seconds. Training uses all of them, unless a
check finds one wrong; scoring, with rows of any length, uses none.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from types import MappingProxyType

import torch

from kernels.backend import choose_backend

# Folders of kernels/. Those of a group are checked in one process; if one is wrong, the run does without all of them.
# The second group has no matrix products, and is compiled fast.
GROUPS = (("attention_context",), ("gated_norm", "normalize", "dropout"), ("depth_mix",))
FUSED = tuple(chain(*GROUPS))

# Kernels of one operation, in the order of preference: the check before a run takes the first that is right, so that a
# compiler's fault costs speed and not the run.
VARIANTS = {"attention_context": ("gather", "load")}

_wanted: frozenset[str] = frozenset()
_variants = {operation: variants[0] for operation, variants in VARIANTS.items()}


def use_fused(operations: Collection[str], variants: Mapping[str, str] = MappingProxyType({})) -> None:
    """Want these operations of `FUSED`, and no others.

    Args:
        operations: names.
        variants: of `VARIANTS`, by operation; else the first.

    Raises:
        ValueError: a name is unknown.
    """
    if unknown := set(operations) - set(FUSED):
        raise ValueError(f"no fused operation {', '.join(sorted(unknown))}; there are {', '.join(FUSED)}")
    for operation, chosen in variants.items():
        if chosen not in VARIANTS.get(operation, ()):
            there = ", ".join(VARIANTS.get(operation, ())) or "none"
            raise ValueError(f"{operation} has no variant {chosen}; there are {there}")
    global _wanted, _variants  # noqa: PLW0603 - process-wide, like `kernels.backend.set_default_backend`
    _wanted = frozenset(operations)
    _variants = {operation: variants.get(operation, names[0]) for operation, names in VARIANTS.items()}


@contextmanager
def without(operation: str) -> Iterator[None]:
    """A block that does without a fused operation: for instance where rows have many lengths."""
    global _wanted  # noqa: PLW0603 - likewise
    before = _wanted
    _wanted = before - {operation}
    try:
        yield
    finally:
        _wanted = before


def variant(operation: str) -> str:
    """Which of an operation's `VARIANTS` this process wants."""
    return _variants[operation]


def is_wanted(operation: str) -> bool:
    """Whether this process wants a fused operation."""
    return operation in _wanted


def runs(operation: str, device: torch.device, backend: str | None = None) -> bool:
    """Whether this process wants a fused operation, and runs Triton's kernels on this device.

    Args:
        operation: of `FUSED`.
        device: of its tensors.
        backend: see `kernels.backend.choose_backend`.
    """
    return is_wanted(operation) and choose_backend(backend, device) == "triton"
