"""Loss, accuracy and gradient of rows of logits in PyTorch: what the kernel does, where there is no Triton."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rows(
    logits: Tensor, labels: Tensor, gradient: Tensor | None, scale: Tensor, ignore_index: int, z_loss_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy row by row.

    Args:
        logits: [N, V].
        labels: [N] integers in 0 … V − 1 or `ignore_index`.
        gradient: [N, V], takes scale · ∂(loss + z_loss_weight · z_loss)/∂logits; may be `logits`. None if not needed.
        scale: fp32 scalar on the device.
        ignore_index: label of rows whose results are all zero.
        z_loss_weight: weight of logsumexp².

    Returns:
        [N] each: loss and z-loss in fp32 (fp64 for fp64 logits), correct in int32.
    """
    labelled = labels != ignore_index
    classes = torch.where(labelled, labels, 0).long().unsqueeze(-1)  # [N, 1]
    largest, predicted = logits.max(dim=-1, keepdim=True)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    log_probs = F.log_softmax(wide, dim=-1)  # [N, V]
    loss = -log_probs.gather(-1, classes)
    lse = largest.to(wide.dtype) - log_probs.gather(-1, predicted)  # [N, 1]
    correct = labelled & (predicted == classes).squeeze(-1)
    if gradient is not None:
        factor = scale * (1 + 2 * z_loss_weight * lse)
        entries = log_probs.exp_().mul_(factor)
        entries.scatter_add_(-1, classes, (-scale).to(entries.dtype).expand_as(classes))
        gradient.copy_(entries.masked_fill_(~labelled.unsqueeze(-1), 0.0))
    loss = torch.where(labelled, loss.squeeze(-1), 0.0)
    z_loss = torch.where(labelled, lse.squeeze(-1).square(), 0.0)
    return loss, z_loss, correct.int()


def multiply(gradient: Tensor, scale: Tensor) -> None:
    """`gradient` times a scalar, in place."""
    gradient.mul_(scale.to(gradient.dtype))
