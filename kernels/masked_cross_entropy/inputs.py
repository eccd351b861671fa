"""Labels, segments and scales, checked and contiguous; the rows to compute."""

import functools

import torch
from torch import Tensor

from kernels import torch_private
from kernels.padding import rounded_rows


def checked(
    labels: Tensor, segments: Tensor | None, scales: Tensor | None, ignore_index: int, vocab_size: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous labels, and segments and scales, all checked, except on Triton, whose kernels check them.

    Raises:
        RuntimeError: on the CPU immediately; on a GPU a device assert, reported at the next synchronization.
    """
    if backend != "triton":
        valid = (labels == ignore_index) | ((labels >= 0) & (labels < vocab_size))
        torch_private.assert_async(
            valid.all(), f"labels: one is neither ignore_index {ignore_index} nor in 0 … {vocab_size - 1}"
        )
        if segments is not None:
            valid = (segments >= 0) & (segments < len(scales))
            torch_private.assert_async(valid.all(), f"segments: one is not in 0 … {len(scales) - 1}")
    return labels.contiguous(), *segments_and_scales(labels, segments, scales)


def segments_and_scales(labels: Tensor, segments: Tensor | None, scales: Tensor | None) -> tuple[Tensor, Tensor]:
    """Segments [N] and scales [S]; without segments all rows are in one."""
    if segments is None:
        segments = _zero(labels.device).expand(len(labels))  # stride 0, so no memory
    return segments, _one(labels.device) if scales is None else scales


def labeled_rows(labels: Tensor, ignore_index: int, backend: str) -> Tensor | None:
    """Indices of rows to compute on the CPU: labeled ones, then a few ignored ones as padding; None: all rows."""
    labeled = labels != ignore_index
    count = int(labeled.sum())
    most = count if backend == "triton" else rounded_rows(count)  # exact in the interpreter, where launches are counted
    return labeled.logical_not().argsort(stable=True)[:most] if most < len(labels) else None


@functools.cache
def _one(device: torch.device) -> Tensor:
    """The scale 1, [1], cached: creating it would be one of a dozen launches."""
    return torch.ones(1, dtype=torch.float32, device=device)


@functools.cache
def _zero(device: torch.device) -> Tensor:
    """The only segment where there are none, [1] int64, cached like `_one`."""
    return torch.zeros(1, dtype=torch.int64, device=device)
