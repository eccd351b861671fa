"""Masked cross-entropy in plain PyTorch: fp32 arithmetic (fp64 for fp64 input) on logits of any dtype."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class MaskedCrossEntropy(NamedTuple):
    """Sums over the labeled rows, on the input's device: scalars, or [S] of each of S segments.

    Attributes:
        total: fp32 scalar, Σ scale · (loss + z_loss_weight · z_loss) over the segments; call `backward` on this one.
        loss: fp32, Σ (logsumexp − logit of the label), detached.
        z_loss: fp32, Σ logsumexp², detached.
        correct: int64, number of rows whose largest logit is the label's.
        count: int64, number of labeled rows.
    """

    total: Tensor
    loss: Tensor
    z_loss: Tensor
    correct: Tensor
    count: Tensor  # type: ignore[assignment]  # the method of tuples is of no use here


def masked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    segments: Tensor | None = None,
    scales: Tensor | None = None,
    ignore_index: int = -100,
    z_loss_weight: float = 0.0,
) -> MaskedCrossEntropy:
    """See `kernels.masked_cross_entropy`."""
    logits = F.linear(hidden, weight, bias)  # [N, V]
    return cross_entropy_from_logits(
        logits, labels, segments=segments, scales=scales, ignore_index=ignore_index, z_loss_weight=z_loss_weight
    )


def cross_entropy_from_logits(
    logits: Tensor,
    labels: Tensor,
    *,
    segments: Tensor | None = None,
    scales: Tensor | None = None,
    ignore_index: int = -100,
    z_loss_weight: float = 0.0,
) -> MaskedCrossEntropy:
    """See `kernels.cross_entropy_from_logits`."""
    labeled = labels != ignore_index
    classes = torch.where(labeled, labels, 0).long().unsqueeze(-1)  # [N, 1]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    # relative to the maximum, so that a confident row's small loss stays exact
    largest, predicted = logits.detach().max(dim=-1, keepdim=True)  # [N, 1]
    shifted = logits - largest
    shifted_lse = torch.logsumexp(shifted, dim=-1)  # [N]
    losses = shifted_lse - shifted.gather(-1, classes).squeeze(-1)  # [N]
    z_losses = (shifted_lse + largest.squeeze(-1)).square()
    is_correct = (predicted == classes).squeeze(-1)
    if segments is None:
        loss, z_loss = (torch.where(labeled, rows, 0.0).sum() for rows in (losses, z_losses))
        correct, count = (labeled & is_correct).sum(), labeled.sum()
        total = loss + z_loss_weight * z_loss
    else:
        members = labeled & (segments == torch.arange(len(scales), device=segments.device)[:, None])  # [S, N]
        loss, z_loss = (torch.where(members, rows, 0.0).sum(dim=1) for rows in (losses, z_losses))  # [S]
        correct, count = (members & is_correct).sum(dim=1), members.sum(dim=1)
        total = (scales.to(loss.dtype) * (loss + z_loss_weight * z_loss)).sum()
    return MaskedCrossEntropy(total, loss.detach(), z_loss.detach(), correct, count)
