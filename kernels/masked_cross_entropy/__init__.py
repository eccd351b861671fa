"""Cross-entropy over the labelled rows, with z-loss and accuracy from the same logits."""

from torch import Tensor

from kernels.backend import choose_backend
from kernels.masked_cross_entropy import reference
from kernels.masked_cross_entropy.reference import MaskedCrossEntropy

__all__ = ["MaskedCrossEntropy", "cross_entropy_from_logits", "masked_cross_entropy"]


def masked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    z_loss_weight: float = 0.0,
    backend: str | None = None,
) -> MaskedCrossEntropy:
    """Cross-entropy of logits = hidden · weightᵀ + bias.

    Args:
        hidden: [N, D], the head's last representation.
        weight: [V, D], often tied to the embedding.
        labels: [N] integers; rows with `ignore_index` count for nothing.
        bias: [V] or None.
        ignore_index: label of the rows left out.
        z_loss_weight: weight of logsumexp² in `total`.
        backend: see `kernels.backend.choose_backend`.

    Returns:
        Sums over the labelled rows. Without any, zeros that still carry a (zero) gradient to every input.

    Raises:
        RuntimeError: a label is neither `ignore_index` nor in 0 … V − 1 (on a GPU: a device assert).
    """
    choose_backend(backend, hidden.device)
    return reference.masked_cross_entropy(
        hidden, weight, labels, bias, ignore_index=ignore_index, z_loss_weight=z_loss_weight
    )


def cross_entropy_from_logits(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    z_loss_weight: float = 0.0,
    backend: str | None = None,
) -> MaskedCrossEntropy:
    """The same as `masked_cross_entropy` for logits [N, V] that exist already."""
    choose_backend(backend, logits.device)
    return reference.cross_entropy_from_logits(logits, labels, ignore_index=ignore_index, z_loss_weight=z_loss_weight)
