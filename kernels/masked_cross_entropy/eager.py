"""Loss, accuracy and gradient of rows of logits in PyTorch, with the same results as the kernels."""

import itertools

import torch
from torch import Tensor

BLOCK_ELEMENTS = 2**20  # logits per block: intermediate results stay in a CPU's cache


def rows(
    logits: Tensor, labels: Tensor, gradient: Tensor | None, scale: Tensor, ignore_index: int, z_loss_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of each row.

    Args:
        logits: [N, V].
        labels: [N] integers in 0 … V − 1 or `ignore_index`.
        gradient: [N, V], output, scale · ∂(loss + z_loss_weight · z_loss)/∂logits; may be `logits`. None if not needed.
        scale: fp32 scalar on the device.
        ignore_index: label of ignored rows; all their results are 0.
        z_loss_weight: weight of logsumexp².

    Returns:
        Loss and z-loss in fp32 (fp64 for fp64 logits), correct in int32, [N] each.
    """
    block = max(1, BLOCK_ELEMENTS // logits.shape[1])
    gradients = itertools.repeat(None) if gradient is None else gradient.split(block)
    blocks = [
        _block(*tensors, scale, ignore_index, z_loss_weight)
        for tensors in zip(logits.split(block), labels.split(block), gradients, strict=False)
    ]
    return tuple(torch.cat(results) for results in zip(*blocks, strict=True))


def _block(
    logits: Tensor, labels: Tensor, gradient: Tensor | None, scale: Tensor, ignore_index: int, z_loss_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
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
        entries *= scale * (1 + 2 * z_loss_weight * lse) / total
        entries.scatter_add_(-1, classes, (-scale).to(wide).expand_as(classes))
        gradient.copy_(entries.masked_fill_(~labeled.unsqueeze(-1), 0.0))
    loss = torch.where(labeled, loss.squeeze(-1), 0.0)
    z_loss = torch.where(labeled, lse.squeeze(-1).square(), 0.0)
    return loss, z_loss, correct.int()


def sums(
    rows: tuple[Tensor, Tensor, Tensor],
    labels: Tensor,
    scale: Tensor,
    ignore_index: int,
    z_loss_weight: float,
    vocab_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over rows.

    Args:
        rows: the result of `rows`.
        labels: [N], its argument.
        scale: factor of the total.
        ignore_index: label of ignored rows.
        z_loss_weight: weight of the z-loss in the total.
        vocab_size: V; unused, as labels were checked before.

    Returns:
        The total; [loss, z_loss]; [correct, labeled] in int64.
    """
    del vocab_size
    loss, z_loss, correct = (tensor.sum() for tensor in rows)
    total = scale * (loss + z_loss_weight * z_loss)
    return total, torch.stack([loss, z_loss]), torch.stack([correct, (labels != ignore_index).sum()])


def multiply(gradient: Tensor, scale: Tensor) -> None:
    """Multiply `gradient` by a scalar, in place."""
    gradient.mul_(scale.to(gradient.dtype))


def multiplied(gradients: list[Tensor], scale: Tensor) -> list[Tensor]:
    """Each gradient times a scalar, as new tensors."""
    return [gradient * scale.to(gradient.dtype) for gradient in gradients]
