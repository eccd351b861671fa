"""Loss, accuracy and gradient of rows of logits in PyTorch, with the same results as the kernels."""

import itertools

import torch
from torch import Tensor

BLOCK_ELEMENTS = 2**20  # logits per block: intermediate results stay in a CPU's cache


def rows(
    logits: Tensor,
    labels: Tensor,
    segments: Tensor,
    scales: Tensor,
    gradient: Tensor | None,
    ignore_index: int,
    z_loss_weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of each row.

    Args:
        logits: [N, V].
        labels: [N] integers in 0 … V − 1 or `ignore_index`.
        segments: [N] int64, of each row the index of its scale.
        scales: [S] fp32.
        gradient: [N, V], output, scale · ∂(loss + z_loss_weight · z_loss)/∂logits; may be `logits`. None if not needed.
        ignore_index: label of ignored rows; all their results are 0.
        z_loss_weight: weight of logsumexp².

    Returns:
        Loss and z-loss in fp32 (fp64 for fp64 logits), correct in int32, [N] each.
    """
    block = max(1, BLOCK_ELEMENTS // logits.shape[1])
    gradients = itertools.repeat(None) if gradient is None else gradient.split(block)
    blocks = [
        _block(*tensors, ignore_index, z_loss_weight)
        for tensors in zip(
            logits.split(block), labels.split(block), scales[segments].split(block), gradients, strict=False
        )
    ]
    losses, z_losses, correct = (torch.cat(results) for results in zip(*blocks, strict=True))
    return losses, z_losses, correct


def _block(
    logits: Tensor, labels: Tensor, scales: Tensor, gradient: Tensor | None, ignore_index: int, z_loss_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """A block of rows, with the scale of each, [N]."""
    labeled = labels != ignore_index
    classes = torch.where(labeled, labels, 0).long().unsqueeze(-1)  # [N, 1]
    largest, predicted = logits.max(dim=-1, keepdim=True)
    correct = labeled & (predicted == classes).squeeze(-1)
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    largest, entries = largest.to(wide), logits.to(wide, copy=True)  # [N, 1], [N, V]
    entries -= largest  # relative to the maximum, so that a confident row's small loss stays exact
    target = entries.gather(-1, classes)
    total = entries.exp_().sum(dim=-1, keepdim=True)
    loss, lse = total.log() - target, largest + total.log()
    if gradient is not None:
        scales = scales.to(wide).unsqueeze(-1)  # [N, 1]
        entries *= scales * (1 + 2 * z_loss_weight * lse) / total
        entries.scatter_add_(-1, classes, -scales)
        gradient.copy_(entries.masked_fill_(~labeled.unsqueeze(-1), 0.0))
    loss = torch.where(labeled, loss.squeeze(-1), 0.0)
    z_loss = torch.where(labeled, lse.squeeze(-1).square(), 0.0)
    return loss, z_loss, correct.int()


def sums(
    rows: tuple[Tensor, Tensor, Tensor],
    labels: Tensor,
    segments: Tensor,
    scales: Tensor,
    ignore_index: int,
    z_loss_weight: float,
    vocab_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the rows of each segment.

    Args:
        rows: the result of `rows`.
        labels: [N], its argument.
        segments: [N], its argument.
        scales: [S], its argument.
        ignore_index: label of ignored rows.
        z_loss_weight: weight of the z-loss in the total.
        vocab_size: V; unused, as labels were checked before.

    Returns:
        The total []; [2, S] loss and z-loss; [2, S] correct and labeled, in int64.
    """
    del vocab_size
    members = segments == torch.arange(len(scales), device=segments.device)[:, None]  # [S, N]
    # torch.where, not a product: a row that is not finite belongs to its own segment alone
    loss, z_loss, correct, labeled = (
        torch.where(members, tensor, 0).sum(dim=1) for tensor in (*rows, (labels != ignore_index).int())
    )
    total = (scales.to(loss.dtype) * (loss + z_loss_weight * z_loss)).sum()
    return total, torch.stack([loss, z_loss]), torch.stack([correct, labeled])


def multiply(gradient: Tensor, scale: Tensor) -> None:
    """Multiply `gradient` by a scalar, in place."""
    gradient.mul_(scale.to(gradient.dtype))


def multiplied(gradients: list[Tensor], scale: Tensor) -> list[Tensor]:
    """Each gradient times a scalar, as new tensors."""
    return [gradient * scale.to(gradient.dtype) for gradient in gradients]
