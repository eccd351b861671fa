"""Rows of bf16 logits by the C++ kernel; sums and scaling from eager.py."""

import torch
from torch import Tensor

from kernels import cpp
from kernels.masked_cross_entropy.eager import multiplied, multiply, sums

__all__ = ["accumulate_product", "multiplied", "multiply", "rows", "sums", "supports"]


def supports(logits: Tensor) -> bool:
    """Whether `rows` takes these logits."""
    return logits.device.type == "cpu" and logits.dtype == torch.bfloat16


def rows(
    logits: Tensor,
    labels: Tensor,
    segments: Tensor,
    scales: Tensor,
    gradient: Tensor | None,
    ignore_index: int,
    z_loss_weight: float,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `eager.rows`; bf16, columns contiguous. `bias` [V] is added to each row."""
    count, classes = logits.shape
    loss, z_loss = (logits.new_empty(count, dtype=torch.float32) for _ in range(2))
    correct = logits.new_empty(count, dtype=torch.int32)
    bias = None if bias is None else bias.float().contiguous()
    strides = (logits.stride(0), 0 if gradient is None else gradient.stride(0), segments.stride(0))
    labels, scales = labels.long().contiguous(), scales.float().contiguous()
    tensors = (logits, labels, segments, scales, bias, gradient, loss, z_loss, correct)
    cpp.call("cross_entropy_rows", (*tensors, ignore_index, float(z_loss_weight), count, classes, *strides))
    return loss, z_loss, correct


def accumulate_product(total: Tensor, product: Tensor, *, is_first: bool) -> None:
    """Add `product`, bf16, to `total`, fp32, or overwrite it if `is_first`; both contiguous."""
    cpp.call("accumulate_product", (total, product, total.numel(), int(is_first)))
