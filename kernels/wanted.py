"""The fused operations that this process wants.

None by default: each has code of its own for some sizes, which takes seconds to compile. So training wants them, unless
a check finds one wrong, and scoring, with rows of any length, does not.
"""

from collections.abc import Collection
from itertools import chain

import torch

from kernels.backend import choose_backend

# Folders of kernels/. Those of a group are checked in one process, and are done without together: the second group has
# no matrix products, and is compiled fast.
GROUPS = (("attention_context",), ("gated_norm", "normalize", "dropout"), ("depth_mix",))
FUSED = tuple(chain(*GROUPS))

_wanted: frozenset[str] = frozenset()


def use_fused(operations: Collection[str]) -> None:
    """Want these operations of `FUSED`, and no others.

    Raises:
        ValueError: a name is unknown.
    """
    if unknown := set(operations) - set(FUSED):
        raise ValueError(f"no fused operation {', '.join(sorted(unknown))}; there are {', '.join(FUSED)}")
    global _wanted  # noqa: PLW0603 - process-wide, like `kernels.backend.set_default_backend`
    _wanted = frozenset(operations)


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
