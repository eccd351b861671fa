"""The registered operations: rows of logits, and hidden states with the output matrix, chunk by chunk."""

import importlib
from types import ModuleType

import torch
from torch import Tensor

from kernels.column_sums import column_sums
from kernels.masked_cross_entropy import cpp_rows
from kernels.masked_cross_entropy import rows as torch_rows
from kernels.padding import PADDING, padded_length, rounded_rows, rows_apart

CHUNK_ELEMENTS = 2**24  # logits that exist at once: 32 MB in bf16
_BLOCK_ROWS = 256  # of the output matrix


@torch.library.custom_op("kernels::cross_entropy", mutates_args=())
def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    scale: Tensor,
    ignore_index: int,
    z_loss_weight: float,
    with_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums [loss, z_loss], counts [correct, labelled], and scale · the gradient of logits [N, V] (else empty)."""
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    gradient = _empty_gradient(logits) if with_gradient else None
    sums, counts = _cross_entropy(logits, labels, gradient, scale, ignore_index, z_loss_weight, backend)
    return sums, counts, logits.new_empty(0) if gradient is None else gradient


@cross_entropy.register_fake
def _(logits, labels, scale, ignore_index, z_loss_weight, with_gradient, backend):
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    return *_fake_sums(logits), _empty_gradient(logits) if with_gradient else logits.new_empty(0)


@torch.library.custom_op("kernels::cross_entropy_", mutates_args={"logits"})
def cross_entropy_(
    logits: Tensor, labels: Tensor, scale: Tensor, ignore_index: int, z_loss_weight: float, backend: str
) -> tuple[Tensor, Tensor]:
    """As `cross_entropy`; the gradient takes the place of the logits."""
    if logits.stride(-1) != 1:
        gradient = logits.contiguous()
        results = _cross_entropy(gradient, labels, gradient, scale, ignore_index, z_loss_weight, backend)
        logits.copy_(gradient)
        return results
    return _cross_entropy(logits, labels, logits, scale, ignore_index, z_loss_weight, backend)


@cross_entropy_.register_fake
def _(logits, labels, scale, ignore_index, z_loss_weight, backend):
    return _fake_sums(logits)


@torch.library.custom_op("kernels::masked_cross_entropy", mutates_args=())
def masked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    z_loss_weight: float,
    compute_dtype: torch.dtype,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Cross-entropy of hidden · weightᵀ + bias, without the [N, V] logits.

    Args:
        hidden: [N, D].
        weight: [V, D].
        labels: [N].
        bias: [V] or None.
        ignore_index: label of the rows that are left out.
        z_loss_weight: weight of logsumexp² in the gradients.
        compute_dtype: of the matrix products.
        needs: whether the gradients of hidden, weight and bias are wanted.
        backend: of the rows.

    Returns:
        Sums [loss, z_loss] in fp32 or wider, counts [correct, labelled]; the gradients of loss + z_loss_weight · z_loss
        with respect to hidden (its type), weight and bias (fp32 or wider), empty where they are not needed.
    """
    check_labels(labels, ignore_index, len(weight))
    kept = None
    if labels.device.type == "cpu":  # a GPU would have to be waited for; there, callers bound the number of rows
        labelled = labels != ignore_index
        count = int(labelled.sum())
        most = rounded_rows(count) if backend == "torch" else count  # kernels that are interpreted are counted
        if most < len(labels):
            kept = labelled.logical_not().argsort(stable=True)[:most]  # the labelled rows, then a few others
    all_rows = hidden.shape
    if kept is not None:
        hidden, labels = hidden[kept], labels[kept]
    matrix, offset = weight.to(compute_dtype), None if bias is None else bias.to(compute_dtype)
    wide = torch.promote_types(compute_dtype, torch.float32)
    needs_hidden, needs_weight, needs_bias = needs
    grad_hidden = torch.zeros(all_rows if needs_hidden else 0, dtype=hidden.dtype, device=hidden.device)
    grad_weight = torch.zeros(weight.shape if needs_weight else 0, dtype=wide, device=hidden.device)
    grad_bias = torch.zeros(len(weight) if needs_bias else 0, dtype=wide, device=hidden.device)
    sums, counts = torch.zeros(2, dtype=wide, device=hidden.device), labels.new_zeros(2, dtype=torch.int64)

    one = torch.ones((), device=hidden.device)
    chunk = max(1, CHUNK_ELEMENTS // len(weight))
    buffer = _aligned_rows(min(chunk, len(labels)), len(weight), compute_dtype, hidden.device)
    product = None if not needs_weight or _multiplies_into_fp32(hidden.device) else torch.empty_like(matrix)
    for first in range(0, len(labels), chunk):
        part = slice(first, first + chunk)
        states, chunk_labels = hidden[part].to(compute_dtype), labels[part]
        logits = buffer[: len(states)]
        if offset is None:
            torch.mm(states, matrix.T, out=logits)
        else:
            torch.addmm(offset, states, matrix.T, out=logits)
        gradient = logits if any(needs) else None
        chunk_sums, chunk_counts = _sums(logits, chunk_labels, gradient, one, ignore_index, z_loss_weight, backend)
        sums += chunk_sums
        counts += chunk_counts
        if needs_hidden:
            grad_hidden[part if kept is None else kept[part]] = (gradient @ matrix).to(hidden.dtype)
        if needs_weight:
            _accumulate_product(grad_weight, gradient.T, states, product, is_first=first == 0)
        if needs_bias:
            by_cpp = cpp_rows.supports(gradient)
            grad_bias += column_sums(gradient) if by_cpp else gradient.sum(dim=0, dtype=wide)
    return sums, counts, grad_hidden, grad_weight, grad_bias


@masked_cross_entropy.register_fake
def _(hidden, weight, labels, bias, ignore_index, z_loss_weight, compute_dtype, needs, backend):
    wide = torch.promote_types(compute_dtype, torch.float32)
    shapes = [
        shape if needed else (0,) for shape, needed in zip((weight.shape, (len(weight),)), needs[1:], strict=True)
    ]
    grad_hidden = hidden.new_empty(hidden.shape if needs[0] else (0,))
    return *_fake_sums(hidden, wide), grad_hidden, *(weight.new_empty(shape, dtype=wide) for shape in shapes)


@torch.library.custom_op("kernels::multiply_", mutates_args={"gradient"})
def multiply_(gradient: Tensor, scale: Tensor, backend: str) -> None:
    """Multiply by a scalar on the device, for nothing where it is one."""
    _implementation(gradient, backend).multiply(gradient, scale)


@multiply_.register_fake
def _(gradient, scale, backend) -> None:
    return None


@torch.library.custom_op("kernels::attach_gradients", mutates_args=())
def attach_gradients(
    total: Tensor, inputs: list[Tensor], gradients: list[Tensor], in_place: bool, backend: str
) -> Tensor:
    """`total`, with `gradients` as its gradients with respect to `inputs`.

    With `in_place` a backward multiplies by `grad_output` in the gradients' own memory, so there can be only one:
    autograd refuses a second, because what was saved has changed.
    """
    del inputs, gradients, in_place, backend
    return total.clone()


@attach_gradients.register_fake
def _(total, inputs, gradients, in_place, backend):
    return torch.empty_like(total)


def _keep_gradients(ctx, inputs, output) -> None:
    _, tensors, gradients, ctx.in_place, ctx.backend = inputs
    ctx.dtypes = [tensor.dtype for tensor in tensors]
    ctx.save_for_backward(*gradients)


def _scaled_gradients(ctx, grad_total):
    gradients = ctx.saved_tensors
    if ctx.in_place and not torch.compiler.is_compiling():
        for gradient in gradients:
            multiply_(gradient, grad_total, ctx.backend)
    else:
        gradients = [gradient * grad_total.to(gradient.dtype) for gradient in gradients]
    gradients = [gradient.to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)]
    return None, gradients, [None] * len(gradients), None, None


attach_gradients.register_autograd(_scaled_gradients, setup_context=_keep_gradients)


def check_labels(labels: Tensor, ignore_index: int, vocab_size: int) -> None:
    """Refuse labels outside the vocabulary, without waiting for a GPU.

    Raises:
        RuntimeError: on the CPU at once; on a GPU as a device assert, when the next synchronisation finds it.
    """
    valid = (labels == ignore_index) | ((labels >= 0) & (labels < vocab_size))
    torch._assert_async(  # noqa: SLF001 - torch's only assertion that does not synchronise
        valid.all(), f"labels: one is neither ignore_index {ignore_index} nor in 0 … {vocab_size - 1}"
    )


def _cross_entropy(
    logits: Tensor,
    labels: Tensor,
    gradient: Tensor | None,
    scale: Tensor,
    ignore_index: int,
    z_loss_weight: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    check_labels(labels, ignore_index, logits.shape[1])
    return _sums(logits, labels, gradient, scale, ignore_index, z_loss_weight, backend)


def _sums(
    logits: Tensor,
    labels: Tensor,
    gradient: Tensor | None,
    scale: Tensor,
    ignore_index: int,
    z_loss_weight: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Rows to sums [loss, z_loss] and counts [correct, labelled]."""
    loss, z_loss, correct = _implementation(logits, backend).rows(
        logits, labels, gradient, scale, ignore_index, z_loss_weight
    )
    return torch.stack([loss.sum(), z_loss.sum()]), torch.stack([correct.sum(), (labels != ignore_index).sum()])


def _implementation(logits: Tensor, backend: str) -> ModuleType:
    """The module that computes rows; the kernel's is imported where it is needed, since Triton may be missing."""
    if backend == "triton":
        kernel = importlib.import_module("kernels.masked_cross_entropy.kernel")
        if kernel.supports(logits):
            return kernel
    return cpp_rows if cpp_rows.supports(logits) else torch_rows


def _aligned_rows(num_rows: int, row_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for [num_rows, row_size], each row at a multiple of 32 bytes or more, so that kernels load wide words."""
    return rows_apart(torch.empty(0, dtype=dtype, device=device), num_rows, row_size, padded_length(row_size))


def _empty_gradient(logits: Tensor) -> Tensor:
    """Memory for the gradient [N, V] of rows whose columns are contiguous, at the same places inside words."""
    num_rows, vocab_size = logits.shape
    stride = vocab_size + (logits.stride(0) - vocab_size) % PADDING
    return rows_apart(logits, num_rows, vocab_size, stride)


def _accumulate_product(total: Tensor, left: Tensor, right: Tensor, product: Tensor | None, *, is_first: bool) -> None:
    """`total` += left · right with sums in fp32; `product` is memory for devices that multiply bf16 into bf16 only."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
        return
    if product is None:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
        return
    torch.mm(left, right, out=product)
    if is_first:
        total.copy_(product)
        return
    # in blocks, since PyTorch widens the whole addend in new memory, which takes longer than the addition
    for part, addend in zip(total.split(_BLOCK_ROWS), product.split(_BLOCK_ROWS), strict=True):
        part.add_(addend)


def _multiplies_into_fp32(device: torch.device) -> bool:
    """Whether matrices of two-byte types can be multiplied into fp32: on GPUs since sm_80."""
    return device.type == "meta" or (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0))


def _fake_sums(like: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    wide = dtype or torch.promote_types(like.dtype, torch.float32)
    return like.new_empty(2, dtype=wide), like.new_empty(2, dtype=torch.int64)
