"""Cross-entropy over the labeled rows, with z-loss and accuracy from the same logits."""

import torch
from torch import Tensor

from kernels.backend import choose_backend
from kernels.masked_cross_entropy import op
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
    """Cross-entropy of logits = hidden · weightᵀ + bias, without materializing all logits [N, V].

    Rows are processed in chunks: a matrix product, then loss and gradient of the chunk in one pass. All gradients are
    computed in the forward, those of weight and bias accumulated in fp32; a backward only multiplies them by
    `grad_output`. No second derivative. On the CPU ignored rows are excluded from the matrix products; on a GPU their
    number would need a device sync, so callers gather the labeled rows (see `gptbert.model.select_labeled`). Under
    autocast, products are in its dtype, regardless of the inputs'.

    Args:
        hidden: [N, D] floating point, the head's last representation.
        weight: [V, D], often tied to the embedding; its dtype may differ.
        labels: [N] integers; rows with `ignore_index` do not count.
        bias: [V] or None.
        ignore_index: label of ignored rows.
        z_loss_weight: weight of logsumexp² in `total`.
        backend: see `kernels.backend.choose_backend`.

    Returns:
        Sums over the labeled rows. Without labeled rows, zeros, with zero gradients of every input.

    Raises:
        ValueError: shapes do not match.
        RuntimeError: a label is neither `ignore_index` nor in 0 … V − 1 (on a GPU: a device assert).
    """
    _check_shapes(hidden, weight, labels, bias)
    backend = choose_backend(backend, hidden.device)
    with_gradient = torch.is_grad_enabled()
    needs = [with_gradient and tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)]
    loss, z_loss, correct, *gradients = op.masked_cross_entropy(
        hidden.detach(),
        weight.detach(),
        labels,
        None if bias is None else bias.detach(),
        ignore_index,
        z_loss_weight,
        _compute_dtype(hidden),
        needs,
        backend,
    )
    inputs = [tensor for tensor, needed in zip((hidden, weight, bias), needs, strict=True) if needed]
    gradients = [tensor for tensor, needed in zip(gradients, needs, strict=True) if needed]
    settings = (ignore_index, z_loss_weight, weight.shape[0])
    return _summed(op.sum_rows(loss, z_loss, correct, labels, None, inputs, gradients, *settings, False, backend))


def cross_entropy_from_logits(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    z_loss_weight: float = 0.0,
    scale: float | Tensor = 1.0,
    reuse_logits: bool = False,
    backend: str | None = None,
) -> MaskedCrossEntropy:
    """As `masked_cross_entropy`, from logits: each is read once, each gradient written once.

    The gradient is computed in the forward. A backward with `grad_output` 1 returns it unchanged; any other value costs
    a pass over it, in place, so factors that are known beforehand (one over the number of labels, say) belong in
    `scale`, and a second backward through the same result is an error.

    Args:
        logits: [N, V] fp32, bf16 or fp16 (fp64, and vocabularies above 65,536: computed by PyTorch).
        labels: [N] integers; rows with `ignore_index` are not read, and their gradients are zero.
        ignore_index: label of ignored rows.
        z_loss_weight: weight of logsumexp² in `total`.
        scale: factor of `total` only: a number, or an fp32 scalar on the device.
        reuse_logits: write the gradient over the logits. Only for logits with no other use, such as the output of a
            linear layer.
        backend: see `kernels.backend.choose_backend`.

    Raises:
        ValueError: shapes do not match.
        RuntimeError: a label is neither `ignore_index` nor in 0 … V − 1 (on a GPU: a device assert), or a second
            backward.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)}: expected [N, V] and [N]")
    backend = choose_backend(backend, logits.device)
    with_gradient = torch.is_grad_enabled() and logits.requires_grad
    if not isinstance(scale, Tensor):
        scale = torch.full((), scale, dtype=torch.float32, device=logits.device)  # no copy from the host
    scale = scale.to(device=logits.device, dtype=torch.float32)
    settings = (ignore_index, z_loss_weight)
    if reuse_logits and with_gradient:
        gradient = logits.detach()
        rows = op.cross_entropy_(gradient, labels, scale, *settings, backend)
    else:
        *rows, gradient = op.cross_entropy(logits.detach(), labels, scale, *settings, with_gradient, backend)
    inputs, gradients = ([logits], [gradient]) if with_gradient else ([], [])
    settings = (*settings, logits.shape[1])
    return _summed(op.sum_rows(*rows, labels, scale, inputs, gradients, *settings, True, backend))


def _summed(results: tuple[Tensor, Tensor, Tensor]) -> MaskedCrossEntropy:
    total, sums, counts = results
    sums = sums.detach()
    return MaskedCrossEntropy(total, sums[0], sums[1], counts[0], counts[1])


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    if torch.is_autocast_enabled(hidden.device.type):
        return torch.get_autocast_dtype(hidden.device.type)
    return hidden.dtype


def _check_shapes(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    fits = hidden.ndim == weight.ndim == 2 and hidden.shape[1] == weight.shape[1] and labels.shape == hidden.shape[:1]
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (hidden, weight, labels, bias) if tensor is not None)
        raise ValueError(f"hidden, weight, labels, bias are {shapes}: expected [N, D], [V, D], [N], [V]")
