"""The remaining kernels, one launch each: sums over rows, and gradients times a scalar."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import torch_private
from kernels.configuration import Configuration, launch_warps

_SUM_BLOCK, _SUM_WARPS = 4096, 16  # rows per iteration of the one program; large, to hide memory latency
_MULTIPLY_BLOCK, _MULTIPLY_WARPS = 4096, 8
_MOST_GRADIENTS = 3  # of hidden, weight and bias
_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@triton.jit(do_not_specialize=["num_rows", "segment_stride", "num_segments", "vocab_size"])
def sum_kernel(
    loss_ptr,
    z_loss_ptr,
    correct_ptr,
    labels_ptr,
    segments_ptr,
    scales_ptr,
    total_ptr,
    sums_ptr,
    counts_ptr,
    is_valid_ptr,
    num_rows,
    segment_stride,
    num_segments,
    vocab_size,
    ignore_index: tl.int64,
    z_loss_weight: tl.float32,
    BLOCK: tl.constexpr,
):
    """One program for all rows [N] and segments S, so that the order of additions is fixed.

    Writes total [], sums [2, S] of loss and z-loss in fp32, counts [2, S] of correct and labeled rows in int64, and
    whether all labels and segments are valid.
    """
    lanes = tl.arange(0, BLOCK)
    total = 0.0
    wrong = tl.zeros([BLOCK], tl.int32)  # rows whose label or segment is out of range
    # Segments are few, and 28 bytes per row stay in the cache, so every segment reads all rows.
    for segment in range(num_segments):
        # 1. Each lane accumulates every BLOCK-th row of the segment.
        loss = tl.zeros([BLOCK], tl.float32)
        z_loss = tl.zeros([BLOCK], tl.float32)
        correct = tl.zeros([BLOCK], tl.int32)
        labeled = tl.zeros([BLOCK], tl.int32)
        for first in range(0, num_rows, BLOCK):
            rows = first + lanes
            inside = rows < num_rows
            segments = tl.load(segments_ptr + rows * segment_stride, mask=inside, other=-1)
            is_member = segments == segment
            loss += tl.load(loss_ptr + rows, mask=is_member, other=0.0)
            z_loss += tl.load(z_loss_ptr + rows, mask=is_member, other=0.0)
            correct += tl.load(correct_ptr + rows, mask=is_member, other=0)
            labels = tl.load(labels_ptr + rows, mask=inside, other=0).to(tl.int64)
            is_labeled = labels != ignore_index
            labeled += (is_member & is_labeled).to(tl.int32)
            is_wrong = (is_labeled & ((labels < 0) | (labels >= vocab_size))) | (segments < 0)
            wrong += (inside & (is_wrong | (segments >= num_segments))).to(tl.int32)
        # 2. Reduce the lanes [BLOCK] to scalars; store the segment's, and add its share to the total.
        loss_sum, z_loss_sum = tl.sum(loss, axis=0), tl.sum(z_loss, axis=0)
        total += tl.load(scales_ptr + segment) * (loss_sum + z_loss_weight * z_loss_sum)
        tl.store(sums_ptr + segment, loss_sum)
        tl.store(sums_ptr + num_segments + segment, z_loss_sum)
        tl.store(counts_ptr + segment, tl.sum(correct, axis=0).to(tl.int64))
        tl.store(counts_ptr + num_segments + segment, tl.sum(labeled, axis=0).to(tl.int64))
    tl.store(total_ptr, total)
    tl.store(is_valid_ptr, (tl.sum(wrong, axis=0) == 0).to(tl.int32))


@triton.jit(do_not_specialize=["first_size", "second_size", "third_size"])
def multiply_kernel(
    first_ptr,
    second_ptr,
    third_ptr,
    first_out_ptr,
    second_out_ptr,
    third_out_ptr,
    scale_ptr,
    first_size: tl.int64,
    second_size: tl.int64,
    third_size: tl.int64,
    BLOCK: tl.constexpr,
):
    """Up to three tensors times a scalar on the device, into new memory; one block [BLOCK] of one tensor per program.

    An absent tensor has size 0.
    """
    # 1. Programs 0 … are the blocks of the first tensor, then of the second, then of the third.
    scale = tl.load(scale_ptr)
    block = tl.program_id(0).to(tl.int64)
    first_blocks, second_blocks = tl.cdiv(first_size, BLOCK), tl.cdiv(second_size, BLOCK)
    if block < first_blocks:
        _multiply_block(first_ptr, first_out_ptr, scale, block, first_size, BLOCK)
    elif block < first_blocks + second_blocks:
        _multiply_block(second_ptr, second_out_ptr, scale, block - first_blocks, second_size, BLOCK)
    else:
        _multiply_block(third_ptr, third_out_ptr, scale, block - first_blocks - second_blocks, third_size, BLOCK)


@triton.jit
def _multiply_block(source_ptr, target_ptr, scale, block, size, BLOCK: tl.constexpr):
    source_ptr += block * BLOCK
    target_ptr += block * BLOCK
    lanes = tl.arange(0, BLOCK)
    left = size - block * BLOCK
    if left >= BLOCK:  # no mask: a mask would make the words narrow
        entries = tl.load(source_ptr + lanes).to(tl.float32) * scale
        tl.store(target_ptr + lanes, entries)
    else:
        entries = tl.load(source_ptr + lanes, mask=lanes < left).to(tl.float32) * scale
        tl.store(target_ptr + lanes, entries, mask=lanes < left)


def sums(
    rows: tuple[Tensor, Tensor, Tensor],
    labels: Tensor,
    segments: Tensor,
    scales: Tensor,
    ignore_index: int,
    z_loss_weight: float,
    vocab_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch `sum_kernel`; same results as `eager.sums`. Checks labels and segments too.

    Raises:
        RuntimeError: a label is neither `ignore_index` nor in 0 … V − 1, or a segment not in 0 … S − 1; on a GPU it is
            a device assert.
    """
    total = torch.empty((), dtype=torch.float32, device=labels.device)
    loss_sums = torch.empty(2, len(scales), dtype=torch.float32, device=labels.device)
    counts = torch.empty(2, len(scales), dtype=torch.int64, device=labels.device)
    is_valid = torch.empty((), dtype=torch.int32, device=labels.device)
    with torch.cuda.device_of(labels):
        sum_kernel[(1,)](
            *rows,
            labels,
            segments,
            scales,
            total,
            loss_sums,
            counts,
            is_valid,
            len(labels),
            segments.stride(0),
            len(scales),
            vocab_size,
            ignore_index,
            z_loss_weight,
            BLOCK=_SUM_BLOCK,
            num_warps=launch_warps(_SUM_WARPS),
        )
    torch_private.assert_async(
        is_valid,
        f"labels: one is neither ignore_index {ignore_index} nor in 0 … {vocab_size - 1}, or one of the segments is "
        f"not in 0 … {len(scales) - 1}",
    )
    return total, loss_sums, counts


def multiplied(gradients: list[Tensor], scale: Tensor) -> list[Tensor]:
    """Launch `multiply_kernel`: each of up to three gradients times a scalar on the device, as new tensors."""
    gradients = [gradient.contiguous() for gradient in gradients]
    results = [torch.empty_like(gradient) for gradient in gradients]
    sizes = [gradient.numel() for gradient in gradients]
    missing = _MOST_GRADIENTS - len(gradients)
    blocks = sum(triton.cdiv(size, _MULTIPLY_BLOCK) for size in sizes)
    if blocks:
        with torch.cuda.device_of(scale):
            multiply_kernel[(blocks,)](
                *gradients,
                *[gradients[-1]] * missing,
                *results,
                *[results[-1]] * missing,
                scale,
                *sizes,
                *[0] * missing,
                BLOCK=_MULTIPLY_BLOCK,
                num_warps=launch_warps(_MULTIPLY_WARPS),
            )
    return results


def configurations() -> list[Configuration]:
    """Every variant of a kernel that `sums` and `multiplied` can start."""
    pointers = {"loss_ptr": "*fp32", "z_loss_ptr": "*fp32", "correct_ptr": "*i32"}
    pointers |= dict.fromkeys(("labels_ptr", "segments_ptr", "counts_ptr"), "*i64")
    pointers |= dict.fromkeys(("scales_ptr", "total_ptr", "sums_ptr"), "*fp32") | {"is_valid_ptr": "*i32"}
    numbers = dict.fromkeys(("num_rows", "segment_stride", "num_segments", "vocab_size"), "i32")
    numbers |= {"ignore_index": "i64", "z_loss_weight": "fp32"}
    found = [
        Configuration(
            "masked_cross_entropy/sum fp32",
            sum_kernel,
            {**pointers, **numbers},
            {"BLOCK": _SUM_BLOCK},
            num_warps=_SUM_WARPS,
            aligned=frozenset(pointers),
            streams=False,  # 28 bytes per row
        )
    ]
    # dtypes of hidden's gradient, and of those of weight and bias; or of hidden's alone
    kinds = [("fp32", "fp32"), *((kind, others) for kind in ("bf16", "fp16") for others in ("fp32", kind))]
    return found + [_multiply_configuration(*kind) for kind in kinds]


def _multiply_configuration(kind: str, others: str) -> Configuration:
    types = [f"*{kind}", f"*{others}", f"*{others}"]
    names = ("first_ptr", "second_ptr", "third_ptr", "first_out_ptr", "second_out_ptr", "third_out_ptr")
    return Configuration(
        f"masked_cross_entropy/multiply {kind} and {others}",
        multiply_kernel,
        {
            **dict(zip(names, types * 2, strict=True)),
            "scale_ptr": "*fp32",
            **dict.fromkeys(("first_size", "second_size", "third_size"), "i64"),
        },
        {"BLOCK": _MULTIPLY_BLOCK},
        num_warps=_MULTIPLY_WARPS,
        aligned=frozenset(names),
        most_spilled={"sm_120": 40 if kind == others == "fp16" else 0},  # training is in bf16
    )
