"""Cross-entropy over the labeled rows, with z-loss and accuracy from the same logits."""

import torch
from torch import Tensor

from kernels import torch_private
from kernels.backend import choose_backend
from kernels.first_order import refuse_tangents
from kernels.linear import Packed
from kernels.masked_cross_entropy import op
from kernels.masked_cross_entropy.reference import MaskedCrossEntropy

__all__ = ["MaskedCrossEntropy", "cross_entropy_from_logits", "masked_cross_entropy"]


def masked_cross_entropy(
    hidden: Tensor,
    weight: Tensor | Packed,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    segments: Tensor | None = None,
    scales: Tensor | None = None,
    ignore_index: int = -100,
    z_loss_weight: float = 0.0,
    backend: str | None = None,
) -> MaskedCrossEntropy:
    """Cross-entropy of logits = hidden · weightᵀ + bias, without materializing all logits [N, V].

    Rows are processed in chunks: a matrix product, then loss and gradient of the chunk in one pass. All gradients are
    computed in the forward, those of weight and bias accumulated in fp32; a backward only multiplies them by
    `grad_output`. No second derivative, and none in forward mode. On the CPU ignored rows are excluded from the matrix
    products; on a GPU their number would need a device sync, so callers gather the labeled rows (see
    `gptbert.model.gptbert.select_labeled`). Under autocast, products are in its dtype, regardless of the inputs'.

    Args:
        hidden: [N, D] floating point, the head's last representation.
        weight: [V, D], often tied to the embedding; its dtype may differ. Or a `Packed` parameter; if it has memory for
            the gradient, the forward writes the gradient there. A backward must then start from `total` itself, so
            factors of the loss belong in `scales`.
        labels: [N] integers; rows with `ignore_index` do not count.
        bias: [V] or None.
        segments: [N] integers in 0 … S − 1, the segment that each row belongs to; None: one for all rows.
        scales: [S], factors of the segments in `total`, without a gradient; given with `segments` only. They are part
            of the gradients from the start, so they cost nothing, and stay on the device.
        ignore_index: label of ignored rows.
        z_loss_weight: weight of logsumexp² in `total`.
        backend: see `kernels.backend.choose_backend`.

    Returns:
        Sums over the labeled rows; with segments [S] each. Without labeled rows zeros, as are all gradients.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
        RuntimeError: a label is neither `ignore_index` nor in 0 … V − 1, or a segment not in 0 … S − 1, or the
            gradient of weight is in memory and `grad_output` is not 1 (on a GPU: a device assert); or an input has a
            tangent of forward mode.
    """
    packed = weight if isinstance(weight, Packed) else Packed((weight,), weight)
    (weight,), matrix, memory, overwrites = packed
    _check_shapes(hidden, weight, labels, bias)
    _check_devices(hidden.device, weight=weight, labels=labels, bias=bias, segments=segments, scales=scales)
    refuse_tangents(hidden, weight, bias)
    labels = _integers("labels", labels)
    segments, scales = _checked_segments(segments, scales, labels)
    backend = choose_backend(backend, hidden.device)
    with_gradient = torch.is_grad_enabled()
    needs = [with_gradient and tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)]
    arguments = (
        *(hidden.detach(), matrix.detach(), labels, None if bias is None else bias.detach(), segments, scales),
        *(ignore_index, z_loss_weight, _compute_dtype(hidden), needs, backend),
    )
    if memory is not None and needs[1]:
        loss, z_loss, correct, *gradients = op.masked_cross_entropy_(*arguments, memory, overwrites)
        tensors, needs = [hidden, bias], [needs[0], needs[2]]
    else:
        loss, z_loss, correct, *gradients = op.masked_cross_entropy(*arguments)
        tensors = [hidden, weight, bias]
    inputs = [tensor for tensor, needed in zip(tensors, needs, strict=True) if needed]
    gradients = [tensor for tensor, needed in zip(gradients, needs, strict=True) if needed]
    settings = (ignore_index, z_loss_weight, weight.shape[0])
    rows = (loss, z_loss, correct, labels, segments, scales)
    total, *sums = op.sum_rows(*rows, inputs, gradients, *settings, False, backend)
    if len(tensors) == 2 and total.requires_grad:
        total.register_hook(_check_grad_output)
    return _summed((total, *sums), segments)


def cross_entropy_from_logits(
    logits: Tensor,
    labels: Tensor,
    *,
    segments: Tensor | None = None,
    scales: Tensor | None = None,
    ignore_index: int = -100,
    z_loss_weight: float = 0.0,
    scale: float | Tensor = 1.0,
    reuse_logits: bool = False,
    backend: str | None = None,
) -> MaskedCrossEntropy:
    """As `masked_cross_entropy`, from logits: each is read once, each gradient written once.

    The gradient is computed in the forward. A backward with `grad_output` 1 returns it unchanged; any other value costs
    a pass over it, in place, so factors that are known beforehand (one over the number of labels, say) belong in
    `scale` or `scales`, and a second backward through the same result is an error.

    Args:
        logits: [N, V] fp32, bf16 or fp16 (fp64, and vocabularies above 65,536: computed by PyTorch).
        labels: [N] integers; rows with `ignore_index` are not read, and their gradients are zero.
        segments: see `masked_cross_entropy`.
        scales: see `masked_cross_entropy`.
        ignore_index: label of ignored rows.
        z_loss_weight: weight of logsumexp² in `total`.
        scale: factor of `total` only, without segments: a number, or an fp32 scalar on the device.
        reuse_logits: write the gradient over the logits. Only for logits with no other use, such as the output of a
            linear layer.
        backend: see `kernels.backend.choose_backend`.

    Raises:
        ValueError: shapes, dtypes or devices do not match, or both `scale` and `scales` are given.
        RuntimeError: a label is neither `ignore_index` nor in 0 … V − 1, or a segment not in 0 … S − 1 (on a GPU: a
            device assert), or a second backward, or a tangent of forward mode.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)}: expected [N, V] and [N]")
    _check_devices(logits.device, labels=labels, segments=segments, scales=scales)
    refuse_tangents(logits)
    backend = choose_backend(backend, logits.device)
    with_gradient = torch.is_grad_enabled() and logits.requires_grad
    labels = _integers("labels", labels)
    segments, scales = _checked_segments(segments, scales, labels)
    if segments is None:
        scales = _as_scales(scale, logits.device)
    elif isinstance(scale, Tensor) or scale != 1:
        raise ValueError("scale: rows with segments have scales [S] alone")
    settings = (segments, scales, ignore_index, z_loss_weight)
    if reuse_logits and with_gradient:
        gradient = logits.detach()
        rows = op.cross_entropy_(gradient, labels, *settings, backend)
    else:
        *rows, gradient = op.cross_entropy(logits.detach(), labels, *settings, with_gradient, backend)
    inputs, gradients = ([logits], [gradient]) if with_gradient else ([], [])
    counts = (ignore_index, z_loss_weight, logits.shape[1])
    sums = op.sum_rows(*rows, labels, segments, scales, inputs, gradients, *counts, True, backend)
    return _summed(sums, segments)


def _check_grad_output(grad: Tensor) -> None:
    message = "the gradient of weight is in its memory already, so `grad_output` must be 1; put factors into `scales`"
    torch_private.assert_async(grad == 1, message)


def _summed(results: tuple[Tensor, Tensor, Tensor], segments: Tensor | None) -> MaskedCrossEntropy:
    total, sums, counts = results
    sums = sums.detach()
    if segments is None:
        sums, counts = sums.squeeze(1), counts.squeeze(1)  # [2, 1] to [2]
    return MaskedCrossEntropy(total, sums[0], sums[1], counts[0], counts[1])


def _as_scales(scale: float | Tensor, device: torch.device) -> Tensor:
    """[1] fp32 on the device, without a copy of a number from the host."""
    if not isinstance(scale, Tensor):
        return torch.full((1,), scale, dtype=torch.float32, device=device)
    if scale.numel() != 1:
        raise ValueError(f"scale: {tuple(scale.shape)}; expected a number or a scalar")
    return scale.detach().to(device=device, dtype=torch.float32).reshape(1)


def _checked_segments(
    segments: Tensor | None, scales: Tensor | None, labels: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Segments [N] in int64 and scales [S] in fp32, contiguous, or None for both."""
    if segments is None and scales is None:
        return None, None
    if segments is None or scales is None or segments.shape != labels.shape or scales.ndim != 1 or not len(scales):
        shapes = ", ".join("None" if tensor is None else str(tuple(tensor.shape)) for tensor in (segments, scales))
        raise ValueError(f"segments and scales are {shapes}: expected {tuple(labels.shape)} and [S], or neither")
    return _integers("segments", segments).contiguous(), scales.detach().float().contiguous()


def _integers(name: str, tensor: Tensor) -> Tensor:
    """The tensor in int64: in a narrower dtype, comparisons with a larger number wrap around."""
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{name}: {tensor.dtype}; expected integers")
    return tensor.long()


def _check_devices(device: torch.device, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name}: on {tensor.device}; expected {device}")


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    if torch.is_autocast_enabled(hidden.device.type):
        return torch.get_autocast_dtype(hidden.device.type)
    return hidden.dtype


def _check_shapes(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    fits = hidden.ndim == weight.ndim == 2 and hidden.shape[1] == weight.shape[1] and labels.shape == hidden.shape[:1]
    if not fits or (bias is not None and bias.shape != weight.shape[:1]):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (hidden, weight, labels, bias) if tensor is not None)
        raise ValueError(f"hidden, weight, labels, bias are {shapes}: expected [N, D], [V, D], [N], [V]")
