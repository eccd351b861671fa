"""The registered operations: rows of logits, and, in chunks, hidden states times the output matrix."""

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernels.add_bias.cpp import column_sums
from kernels.backend import triton_kernel
from kernels.first_order import first_order
from kernels.linear import add_product
from kernels.masked_cross_entropy import cpp, eager
from kernels.masked_cross_entropy.inputs import checked, labeled_rows, segments_and_scales
from kernels.padding import PADDING, padded_length, rounded_rows, rows_apart

# Limit on the bytes of a chunk's logits. On a GPU 2²⁸ logits in bf16, a tenth of plain PyTorch's memory for as many:
# each chunk costs launches. A constant: free memory would make results depend on the machine's state to the bit.
CHUNK_BYTES = {"cpu": 2**26, "gpu": 2**29}

Rows = tuple[Tensor, Tensor, Tensor]  # loss, z-loss and correct [N]


@torch.library.custom_op("kernels::cross_entropy", mutates_args=())
def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    segments: Tensor | None,
    scales: Tensor,
    ignore_index: int,
    z_loss_weight: float,
    with_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, z-loss and correct of each row [N], and scale · the gradient of logits [N, V] (empty if not wanted).

    `scales` [S] are those of `segments` [N]; without segments it has one entry, for all rows.
    """
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    gradient = _empty_gradient(logits) if with_gradient else None
    rows = _cross_entropy(logits, labels, segments, scales, gradient, ignore_index, z_loss_weight, backend)
    return *rows, logits.new_empty(0) if gradient is None else gradient


@cross_entropy.register_fake
def _(logits, labels, segments, scales, ignore_index, z_loss_weight, with_gradient, backend):
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    return *_fake_rows(logits, logits.shape[0]), _empty_gradient(logits) if with_gradient else logits.new_empty(0)


@torch.library.custom_op("kernels::cross_entropy_", mutates_args={"logits"})
def cross_entropy_(
    logits: Tensor,
    labels: Tensor,
    segments: Tensor | None,
    scales: Tensor,
    ignore_index: int,
    z_loss_weight: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `cross_entropy`; the gradient overwrites the logits."""
    if logits.stride(-1) != 1 or logits.stride(0) < logits.shape[1]:  # rows that overlap, which `copy_` refuses
        gradient = logits.contiguous()
        results = _cross_entropy(gradient, labels, segments, scales, gradient, ignore_index, z_loss_weight, backend)
        logits.copy_(gradient)
        return results
    return _cross_entropy(logits, labels, segments, scales, logits, ignore_index, z_loss_weight, backend)


@cross_entropy_.register_fake
def _(logits, labels, segments, scales, ignore_index, z_loss_weight, backend):
    return _fake_rows(logits, logits.shape[0])


@torch.library.custom_op("kernels::masked_cross_entropy", mutates_args=())
def masked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    segments: Tensor | None,
    scales: Tensor | None,
    ignore_index: int,
    z_loss_weight: float,
    compute_dtype: torch.dtype,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Cross-entropy of hidden · weightᵀ + bias, without the [N, V] logits.

    Args:
        hidden: [N, D].
        weight: [V, D].
        labels: [N].
        bias: [V] or None.
        segments: [N] integers in 0 … S − 1, or None.
        scales: [S] fp32, factors of the segments' gradients, or None without segments.
        ignore_index: label of ignored rows.
        z_loss_weight: weight of logsumexp² in the gradients.
        compute_dtype: of the matrix products.
        needs: whether gradients of hidden, weight and bias are needed.
        backend: see `kernels.backend`.

    Returns:
        Loss and z-loss of each row in fp32 or wider, correct in int32, [N] each; gradients of Σ scale · (loss +
        z_loss_weight · z_loss) with respect to hidden (its dtype), weight and bias (fp32 or wider), each empty if not
        needed.
    """
    settings = (ignore_index, z_loss_weight, compute_dtype, needs, backend)
    results = _in_chunks(hidden, weight, labels, bias, segments, scales, *settings)
    loss, z_loss, correct, grad_hidden, grad_weight, grad_bias = results
    return loss, z_loss, correct, grad_hidden, loss.new_empty(0) if grad_weight is None else grad_weight, grad_bias


@masked_cross_entropy.register_fake
def _fake(hidden, weight, labels, bias, segments, scales, ignore_index, z_loss_weight, compute_dtype, needs, backend):
    wide = torch.promote_types(compute_dtype, torch.float32)
    shapes = [
        shape if needed else (0,) for shape, needed in zip((weight.shape, (len(weight),)), needs[1:], strict=True)
    ]
    grad_hidden = hidden.new_empty(hidden.shape if needs[0] else (0,))
    gradients = [weight.new_empty(shape, dtype=wide) for shape in shapes]
    return *_fake_rows(hidden, hidden.shape[0], wide), grad_hidden, *gradients


@torch.library.custom_op("kernels::masked_cross_entropy_", mutates_args={"grad_weight"})
def masked_cross_entropy_(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    segments: Tensor | None,
    scales: Tensor | None,
    ignore_index: int,
    z_loss_weight: float,
    compute_dtype: torch.dtype,
    needs: list[bool],
    backend: str,
    grad_weight: Tensor,
    overwrites: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `masked_cross_entropy`; the gradient of weight is added to `grad_weight` [V, D], or overwrites that."""
    settings = (ignore_index, z_loss_weight, compute_dtype, needs, backend)
    memory: dict[str, Any] = {"grad_weight": grad_weight, "overwrites": overwrites}
    results = _in_chunks(hidden, weight, labels, bias, segments, scales, *settings, **memory)
    loss, z_loss, correct, grad_hidden, _, grad_bias = results
    return loss, z_loss, correct, grad_hidden, grad_bias


@masked_cross_entropy_.register_fake
def _(*arguments):  # noqa: ANN002
    *rest, _grad_weight, _overwrites = arguments
    *rows_and_hidden, _, grad_bias = _fake(*rest)
    return *rows_and_hidden, grad_bias


def _in_chunks(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    segments: Tensor | None,
    scales: Tensor | None,
    ignore_index: int,
    z_loss_weight: float,
    compute_dtype: torch.dtype,
    needs: list[bool],
    backend: str,
    *,
    grad_weight: Tensor | None = None,
    overwrites: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """The results of `masked_cross_entropy`, the gradient of weight in the given memory, or None if not needed."""
    labels, segments, scales = checked(labels, segments, scales, ignore_index, len(weight), backend)
    num_rows, kept = len(labels), None
    if labels.device.type == "cpu":  # a GPU would need a device sync; callers gather labeled rows instead
        kept = labeled_rows(labels, ignore_index, backend)
    # 1. Inputs in compute_dtype, [N, D], [V, D] and [V]; on the CPU only labeled rows, padded to a recurring number.
    states = hidden if kept is None else hidden[kept]
    labels, segments = (labels, segments) if kept is None else (labels[kept], segments[kept])
    states, matrix = states.to(compute_dtype), weight.to(compute_dtype)
    offset = None if bias is None else bias.to(compute_dtype)
    needs_hidden, needs_weight, needs_bias = needs
    grad_hidden = torch.empty_like(states) if needs_hidden else states.new_empty(0)
    grad_bias = None

    # 2. One buffer [chunk, V] holds each chunk's logits, and then their gradient.
    chunk = _chunk_rows(len(states), len(weight), compute_dtype, hidden.device)
    buffer = _aligned_rows(min(chunk, len(states)), len(weight), compute_dtype, hidden.device)
    by_cpp = backend == "cpp" and cpp.supports(buffer)
    rows = functools.partial(cpp.rows, bias=offset) if by_cpp else _implementation(buffer, backend).rows
    results = []
    for first in range(0, max(1, len(states)), chunk):
        # 3. Logits of the chunk; loss, accuracy and gradient of its rows; accumulate the gradients of all inputs.
        part, part_labels, part_segments = (each[first : first + chunk] for each in (states, labels, segments))
        logits = buffer[: len(part)]
        if offset is None or by_cpp:  # C++ adds the bias itself; addmm first broadcasts it to a matrix
            torch.mm(part, matrix.T, out=logits)
        else:
            torch.addmm(offset, part, matrix.T, out=logits)
        gradient = logits if any(needs) else None
        results.append(rows(logits, part_labels, part_segments, scales, gradient, ignore_index, z_loss_weight))
        if needs_hidden:
            torch.mm(gradient, matrix, out=grad_hidden[first : first + chunk])
        if first + chunk >= len(states):
            del matrix  # freed before the weight's gradient is allocated: with one chunk, the peak of memory
        if needs_weight:
            if grad_weight is None:
                wide = torch.promote_types(compute_dtype, torch.float32)
                grad_weight = torch.empty(weight.shape, dtype=wide, device=weight.device)
            _add_product(grad_weight, gradient.T, part, overwrites=overwrites and first == 0, by_cpp=by_cpp)
        if needs_bias:
            grad_bias = _plus_column_sums(grad_bias, gradient, by_cpp=by_cpp)
    # 4. Concatenate the chunks; scatter rows back to [N].
    rows = results[0] if len(results) == 1 else tuple(torch.cat(tensors) for tensors in zip(*results, strict=True))
    grad_hidden = grad_hidden.to(hidden.dtype)
    if kept is not None:
        rows = tuple(_spread(tensor, kept, num_rows) for tensor in rows)
        grad_hidden = _spread(grad_hidden, kept, num_rows) if needs_hidden else grad_hidden
    return *rows, grad_hidden, grad_weight, rows[0].new_empty(0) if grad_bias is None else grad_bias


@torch.library.custom_op("kernels::multiply_", mutates_args={"gradient"})
def multiply_(gradient: Tensor, scale: Tensor, backend: str) -> None:
    """Multiply by a scalar on the device; no memory traffic on a GPU if the scalar is 1."""
    _implementation(gradient, backend).multiply(gradient, scale)


@multiply_.register_fake
def _(gradient, scale, backend) -> None:
    return None


@torch.library.custom_op("kernels::multiplied", mutates_args=())
def multiplied(gradients: list[Tensor], scale: Tensor, backend: str) -> list[Tensor]:
    """Each gradient times a scalar on the device, as new tensors."""
    return _implementation(gradients[0], backend, takes_rows=False).multiplied(gradients, scale)


@multiplied.register_fake
def _(gradients, scale, backend):
    return [torch.empty_like(gradient) for gradient in gradients]


@torch.library.custom_op("kernels::sum_rows", mutates_args=())
def sum_rows(
    loss: Tensor,
    z_loss: Tensor,
    correct: Tensor,
    labels: Tensor,
    segments: Tensor | None,
    scales: Tensor | None,
    inputs: list[Tensor],
    gradients: list[Tensor],
    ignore_index: int,
    z_loss_weight: float,
    vocab_size: int,
    in_place: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Total [], [2, S] sums of loss and z-loss, [2, S] counts of correct and labeled rows; S is 1 without segments.

    `gradients` are those of the total with respect to `inputs`. With `in_place` a backward multiplies them by
    `grad_output` in place, so there can be only one: autograd rejects a second, as saved tensors have changed.
    """
    del inputs, gradients, in_place
    segments, scales = segments_and_scales(labels, segments, scales)
    sums = _implementation(loss, backend, takes_rows=False).sums
    return sums((loss, z_loss, correct), labels.contiguous(), segments, scales, ignore_index, z_loss_weight, vocab_size)


@sum_rows.register_fake
def _(
    loss,
    z_loss,
    correct,
    labels,
    segments,
    scales,
    inputs,
    gradients,
    ignore_index,
    z_loss_weight,
    vocab_size,
    in_place,
    backend,
):
    shape = (2, 1 if scales is None else len(scales))
    return loss.new_empty(()), loss.new_empty(shape), loss.new_empty(shape, dtype=torch.int64)


def _keep_gradients(ctx, inputs, output) -> None:
    del output
    *_, tensors, gradients, _, _, _, ctx.in_place, ctx.backend = inputs
    ctx.dtypes = [tensor.dtype for tensor in tensors]
    ctx.save_for_backward(*gradients)
    ctx.set_materialize_grads(False)  # no zero tensors for the sums, which have no gradient


@first_order
def _scaled_gradients(ctx, grad_total, grad_sums, grad_counts):
    del grad_sums, grad_counts
    gradients = ctx.saved_tensors
    if torch.compiler.is_compiling():  # fused by the compiler
        gradients = [gradient * grad_total.to(gradient.dtype) for gradient in gradients]
    elif ctx.in_place:
        for gradient in gradients:
            multiply_(gradient, grad_total, ctx.backend)
    elif gradients:
        gradients = multiplied(list(gradients), grad_total, ctx.backend)
    gradients = [gradient.to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)]
    return *[None] * 6, gradients, [None] * len(gradients), *[None] * 5


sum_rows.register_autograd(_scaled_gradients, setup_context=_keep_gradients)


def _chunk_rows(num_rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows per chunk: as few chunks as the limit allows, of about the same size."""
    most = max(1, CHUNK_BYTES["cpu" if device.type == "cpu" else "gpu"] // (vocab_size * dtype.itemsize))
    chunks = max(1, -(-num_rows // most))
    return max(1, min(most, rounded_rows(-(-num_rows // chunks))))


def _cross_entropy(
    logits: Tensor,
    labels: Tensor,
    segments: Tensor | None,
    scales: Tensor,
    gradient: Tensor | None,
    ignore_index: int,
    z_loss_weight: float,
    backend: str,
) -> Rows:
    labels, segments, scales = checked(labels, segments, scales, ignore_index, logits.shape[1], backend)
    rows = _implementation(logits, backend).rows
    return rows(logits, labels, segments, scales, gradient, ignore_index, z_loss_weight)


def _implementation(tensor: Tensor, backend: str, *, takes_rows: bool = True) -> ModuleType:
    """The module with `rows` for these logits, or with `sums` and `multiplied` for this dtype."""
    if backend == "triton":
        kernel = triton_kernel("masked_cross_entropy")
        if kernel.supports(tensor) if takes_rows else tensor.dtype != torch.float64:
            return kernel
    return cpp if backend == "cpp" and cpp.supports(tensor) else eager


def _aligned_rows(num_rows: int, row_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialized [num_rows, row_size], rows aligned to 32 bytes or more, so that kernels load wide words."""
    return rows_apart(torch.empty(0, dtype=dtype, device=device), num_rows, row_size, padded_length(row_size))


def _empty_gradient(logits: Tensor) -> Tensor:
    """Uninitialized gradient [N, V] for logits with contiguous columns; rows have the same offsets within words."""
    num_rows, vocab_size = logits.shape
    stride = vocab_size + (logits.stride(0) - vocab_size) % PADDING
    return rows_apart(logits, num_rows, vocab_size, stride)


def _add_product(total: Tensor, left: Tensor, right: Tensor, *, overwrites: bool, by_cpp: bool) -> None:
    if by_cpp and left.dtype != total.dtype:
        cpp.accumulate_product(total, torch.mm(left, right), is_first=overwrites)
    else:
        add_product(total, left, right, overwrites=overwrites)


def _plus_column_sums(total: Tensor | None, gradient: Tensor, *, by_cpp: bool = False) -> Tensor:
    """`total` (None: zero) + column sums of the gradient, in fp32 or wider."""
    wide = torch.promote_types(gradient.dtype, torch.float32)
    sums = column_sums(gradient) if by_cpp else gradient.sum(dim=0, dtype=wide)
    return sums if total is None else total.add_(sums)


def _spread(rows: Tensor, kept: Tensor, num_rows: int) -> Tensor:
    """Scatter rows [K, …] to their indices `kept` [K] in zeros [num_rows, …]."""
    return rows.new_zeros(num_rows, *rows.shape[1:]).index_copy_(0, kept, rows)


def _fake_rows(like: Tensor, num_rows: int, dtype: torch.dtype | None = None) -> Rows:
    wide = dtype or torch.promote_types(like.dtype, torch.float32)
    return (
        like.new_empty(num_rows, dtype=wide),
        like.new_empty(num_rows, dtype=wide),
        like.new_empty(num_rows, dtype=torch.int32),
    )
