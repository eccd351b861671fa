"""Loss, accuracy and gradient of rows of logits. A row stays in registers: read once, its gradient written once."""

import itertools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.configuration import Configuration, launch_warps
from kernels.masked_cross_entropy import sum_kernel
from kernels.masked_cross_entropy.sum_kernel import multiplied, sums
from kernels.padding import PADDING

__all__ = ["configurations", "layout", "multiplied", "multiply", "rows", "sums", "supports"]

MAX_VOCAB_SIZE = 65_536
WORD = 8  # consecutive elements per thread: 128 bits of bf16, two words of 128 bits of fp32
_SCALE_BLOCK, _SCALE_WARPS = 8192, 8
_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_NO_COLUMN = tl.constexpr(2**31 - 1)
_WORD = tl.constexpr(WORD)


class Layout(NamedTuple):
    """How a program holds a row: in `pieces` blocks, the first `full_pieces` of them without a mask."""

    block: int
    pieces: int
    full_pieces: int
    num_warps: int
    max_registers: int


def layout(vocab_size: int, is_aligned: bool = True) -> Layout:
    """The layout for a vocabulary of 1 … MAX_VOCAB_SIZE.

    Up to 64 elements per thread in 128 registers, which leaves enough for the arithmetic on every target GPU. Up to
    V = 16,384 several programs share a multiprocessor, so that one loads while another computes. Above 32,768 a program
    would need more than the 65,536 registers of a multiprocessor, so it gets 64 per thread and spills. Rows that begin
    inside a word end up to seven elements earlier, counted from their first whole word, so fewer pieces are full.
    """
    choices = (0, 0, 1, 2, 4, 6, 8)  # pieces; few, to compile few variants
    num_warps = 4
    while num_warps < 32 and vocab_size > choices[-1] * num_warps * 32 * WORD:
        num_warps *= 2
    block = num_warps * 32 * WORD
    choice = next(index for index, pieces in enumerate(choices) if pieces * block >= vocab_size)
    full_pieces = choices[choice - 1 if is_aligned else choice - 2]
    return Layout(block, choices[choice], full_pieces, num_warps, 128 if num_warps < 32 else 64)


@triton.jit(do_not_specialize=["segment_stride", "num_segments"])
def rows_kernel(
    logits_ptr,
    labels_ptr,
    segments_ptr,
    scales_ptr,
    gradient_ptr,
    loss_ptr,
    z_loss_ptr,
    correct_ptr,
    logits_stride,
    gradient_stride,
    segment_stride,
    num_segments,
    vocab_size,
    ignore_index: tl.int64,
    z_loss_weight: tl.float32,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECES: tl.constexpr,
    FULL_PIECES: tl.constexpr,
    WRITE_GRADIENT: tl.constexpr,
):
    """One program per row [V]. `gradient_ptr` may be `logits_ptr`: a row is in registers before it is overwritten.

    Columns are counted from the row's first whole word (WORD elements). If rows begin inside a word (not ALIGNED), the
    up to seven columns before it are the head. The gradient's rows have the same offsets within words as the logits'.
    """
    # 1. Addresses: rows as [head, PIECES · BLOCK], int64 offsets to the row, int32 within it.
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row).to(tl.int64)
    first_word = _first_word(row * logits_stride, ALIGNED)
    head_size = (first_word - row * logits_stride).to(tl.int32)
    logits_ptr += first_word
    gradient_ptr += _first_word(row * gradient_stride, ALIGNED)
    element: tl.constexpr = gradient_ptr.dtype.element_ty
    end = vocab_size - head_size
    lanes = tl.arange(0, BLOCK)
    head_lanes = tl.arange(0, _WORD) - _WORD
    in_head = (head_lanes >= -head_size) & (head_lanes < end)
    # 2. Ignored row: zeros, without reading its logits.
    if label == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        tl.store(z_loss_ptr + row, 0.0)
        tl.store(correct_ptr + row, 0)
        if WRITE_GRADIENT:
            tl.store(gradient_ptr + head_lanes, tl.zeros([_WORD], element), mask=in_head)
            for piece in tl.static_range(PIECES):
                inside = (lanes < end - piece * BLOCK) | (piece < FULL_PIECES)
                tl.store(gradient_ptr + piece * BLOCK + lanes, tl.zeros([BLOCK], element), mask=inside)
        return

    # 3. Load the label's logit; every logit once, in its own dtype, into registers. Maximum in fp32.
    column = label.to(tl.int32) - head_size
    is_class = (label >= 0) & (label < vocab_size)  # `sum_kernel` reports labels out of range
    target = tl.load(logits_ptr + column, mask=is_class, other=float("nan")).to(tl.float32)
    head = tl.load(logits_ptr + head_lanes, mask=in_head, other=float("-inf")).to(tl.float32)
    logits = ()
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    for piece in tl.static_range(PIECES):
        inside = (lanes < end - piece * BLOCK) | (piece < FULL_PIECES)
        # the last word unmasked, which saves registers; no memory page ends inside a word
        readable = (lanes < tl.cdiv(end, _WORD) * _WORD - piece * BLOCK) | (piece < FULL_PIECES)
        entries = tl.load(logits_ptr + piece * BLOCK + lanes, mask=readable, other=float("-inf"))
        entries = tl.where(inside, entries, tl.full((), float("-inf"), tl.float32).to(entries.dtype))
        logits = logits + (entries,)
        largest = tl.maximum(largest, entries.to(tl.float32))
    largest = tl.maximum(tl.max(head, axis=0), tl.max(largest, axis=0))

    # 4. Argmax: the first maximum, as in torch.max. Lanes hold columns; _NO_COLUMN where x < maximum.
    predicted = tl.full([BLOCK], _NO_COLUMN, tl.int32)
    for piece in tl.static_range(PIECES):
        is_largest = logits[piece].to(tl.float32) == largest
        predicted = tl.minimum(predicted, tl.where(is_largest, piece * BLOCK + lanes, _NO_COLUMN))
    head_predicted = tl.where(head == largest, head_lanes, _NO_COLUMN)
    predicted = tl.minimum(tl.min(head_predicted, axis=0), tl.min(predicted, axis=0))
    tl.store(correct_ptr + row, (predicted == column).to(tl.int32))

    # 5. Σ exp(x − maximum) in fp32, head and pieces; loss and z-loss.
    total = tl.zeros([BLOCK], tl.float32)
    for piece in tl.static_range(PIECES):
        total += tl.exp(logits[piece].to(tl.float32) - largest)
    total = tl.sum(tl.exp(head - largest), axis=0) + tl.sum(total, axis=0)
    shifted_lse = tl.log(total)  # relative to the maximum, so that a confident row's small loss stays exact
    lse = largest + shifted_lse
    tl.store(loss_ptr + row, shifted_lse - (target - largest))
    tl.store(z_loss_ptr + row, lse * lse)

    if WRITE_GRADIENT:
        # 6. Gradient from the registers, scale · (softmax · (1 + 2λ·logsumexp) − [label]), one store per piece. The
        #    scale is that of the row's segment; `sum_kernel` reports segments out of range.
        segment = tl.load(segments_ptr + row * segment_stride)
        is_segment = (segment >= 0) & (segment < num_segments)
        scale = tl.load(scales_ptr + segment, mask=is_segment, other=float("nan"))
        factor = scale * (1 + 2 * z_loss_weight * lse) / total
        head = _entries(head, largest, factor, scale, head_lanes == column)
        tl.store(gradient_ptr + head_lanes, head.to(element), mask=in_head)
        for piece in tl.static_range(PIECES):
            entries = _entries(logits[piece], largest, factor, scale, lanes == column - piece * BLOCK)
            inside = (lanes < end - piece * BLOCK) | (piece < FULL_PIECES)
            tl.store(gradient_ptr + piece * BLOCK + lanes, entries.to(element), mask=inside)


@triton.jit
def _first_word(row_start, ALIGNED: tl.constexpr):
    """Offset of the first whole word of a row."""
    if ALIGNED:
        return row_start
    return tl.cdiv(row_start, _WORD) * _WORD


@triton.jit
def _entries(logits, largest, factor, scale, is_label):
    """The gradient of a block of logits: factor · e^(x − largest), minus scale at the label."""
    entries = tl.exp(logits.to(tl.float32) - largest) * factor
    return tl.where(is_label, entries - scale, entries)


@triton.jit(do_not_specialize=["width", "blocks_per_row"])
def scale_kernel(
    gradient_ptr, scale_ptr, gradient_stride: tl.int64, width: tl.int64, blocks_per_row: tl.int64, BLOCK: tl.constexpr
):
    """Multiply a block of a row by a scalar on the device, in place; no memory traffic if the scalar is 1."""
    scale = tl.load(scale_ptr)
    if scale == 1.0:
        return
    row, block = tl.program_id(0) // blocks_per_row, tl.program_id(0) % blocks_per_row
    pointers = gradient_ptr + row * gradient_stride + block * BLOCK + tl.arange(0, BLOCK)
    left = width - block * BLOCK
    if left >= BLOCK:  # no mask: a mask would make the words narrow
        tl.store(pointers, tl.load(pointers).to(tl.float32) * scale)
    else:
        inside = tl.arange(0, BLOCK) < left
        entries = tl.load(pointers, mask=inside).to(tl.float32) * scale
        tl.store(pointers, entries, mask=inside)


def supports(logits: Tensor) -> bool:
    """Whether `rows` takes these logits; eager.py takes the others."""
    return logits.dtype in _TYPES and logits.shape[1] <= MAX_VOCAB_SIZE and logits.stride(1) == 1


def rows(
    logits: Tensor,
    labels: Tensor,
    segments: Tensor,
    scales: Tensor,
    gradient: Tensor | None,
    ignore_index: int,
    z_loss_weight: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch `rows_kernel`; same results as `eager.rows`."""
    num_rows, vocab_size = logits.shape
    target = logits if gradient is None else gradient
    if not _in_same_words(logits, target):
        moved = logits.clone(memory_format=torch.contiguous_format)
        target = None if gradient is None else moved
        results = rows(moved, labels, segments, scales, target, ignore_index, z_loss_weight)
        if gradient is not None:
            gradient.copy_(moved)
        return results
    loss, z_loss = (torch.empty(num_rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    correct = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    is_aligned = all(tensor.stride(0) % PADDING == 0 for tensor in (logits, target))
    block, pieces, full_pieces, num_warps, max_registers = layout(vocab_size, is_aligned)
    if num_rows:
        with torch.cuda.device_of(logits):
            rows_kernel[(num_rows,)](
                logits,
                labels,
                segments,
                scales,
                target,
                loss,
                z_loss,
                correct,
                logits.stride(0),
                target.stride(0),
                segments.stride(0),
                len(scales),
                vocab_size,
                ignore_index,
                z_loss_weight,
                ALIGNED=is_aligned,
                BLOCK=block,
                PIECES=pieces,
                FULL_PIECES=full_pieces,
                WRITE_GRADIENT=gradient is not None,
                num_warps=launch_warps(num_warps),
                **({} if torch.version.hip else {"maxnreg": max_registers}),
            )
    return loss, z_loss, correct


def _in_same_words(logits: Tensor, gradient: Tensor) -> bool:
    """Whether the first row is word-aligned in both, and all rows have the same offsets within words in both."""
    starts_word = all(tensor.data_ptr() % (WORD * tensor.element_size()) == 0 for tensor in (logits, gradient))
    return starts_word and (logits.stride(0) - gradient.stride(0)) % WORD == 0


def multiply(gradient: Tensor, scale: Tensor) -> None:
    """Launch `scale_kernel`: gradient [N, V] times a scalar on the device, in place."""
    rows = gradient.view(1, -1) if gradient.is_contiguous() else gradient  # one long row: wide words at any stride
    num_rows, width = rows.shape
    blocks_per_row = triton.cdiv(width, _SCALE_BLOCK)
    if gradient.numel():
        with torch.cuda.device_of(gradient):
            scale_kernel[(num_rows * blocks_per_row,)](
                rows,
                scale,
                0 if num_rows == 1 else rows.stride(0),
                width,
                blocks_per_row,
                BLOCK=_SCALE_BLOCK,
                num_warps=launch_warps(_SCALE_WARPS),
            )


def configurations() -> list[Configuration]:
    """Every variant of a kernel that the launchers here and in sum_kernel.py can start."""
    found = sum_kernel.configurations()
    widths = [1024, 2048, 4096, 6144, 8192, 12288, 16384, 24576, 32768, 49152, 65536]
    for dtype in _TYPES.values():
        for width, write_gradient in itertools.product(widths, (True, False)):
            found.append(_rows_configuration(dtype, width, write_gradient))
            found.append(_rows_configuration(dtype, width, write_gradient, is_even=False))
            found.append(_rows_configuration(dtype, width, write_gradient, is_even=False, is_aligned=False))
        found += [_scale_configuration(dtype, is_aligned=is_aligned) for is_aligned in (True, False)]
    return found


def _rows_configuration(
    dtype: str, width: int, write_gradient: bool, *, is_even: bool = True, is_aligned: bool = True
) -> Configuration:
    """`is_even`: the vocabulary is a multiple of 16; `is_aligned`: rows start at multiples of 16 elements."""
    block, pieces, full_pieces, num_warps, max_registers = layout(width, is_aligned)
    pointers = {"logits_ptr": f"*{dtype}", "labels_ptr": "*i64", "segments_ptr": "*i64", "scales_ptr": "*fp32"}
    pointers |= {"gradient_ptr": f"*{dtype}", "loss_ptr": "*fp32", "z_loss_ptr": "*fp32", "correct_ptr": "*i32"}
    strides = {"logits_stride": "i32", "gradient_stride": "i32"}
    numbers = {"segment_stride": "i32", "num_segments": "i32", "vocab_size": "i32"}
    kind = "" if write_gradient else " loss only"
    kind += ("" if is_even else " odd V") if is_aligned else " unaligned"
    return Configuration(
        f"masked_cross_entropy/rows {dtype} V={width}{kind}",
        rows_kernel,
        {**pointers, **strides, **numbers, "ignore_index": "i64", "z_loss_weight": "fp32"},
        {
            "ALIGNED": is_aligned,
            "BLOCK": block,
            "PIECES": pieces,
            "FULL_PIECES": full_pieces,
            "WRITE_GRADIENT": write_gradient,
        },
        num_warps=num_warps,
        max_registers=max_registers,
        aligned=frozenset(
            ["logits_ptr", "gradient_ptr", *(strides if is_aligned else ()), *(["vocab_size"] if is_even else ())]
        ),
        streams=(is_aligned and is_even) or full_pieces > 0,
        most_spilled={"any": math.inf if width > 32768 else 0},  # see `layout`
    )


def _scale_configuration(dtype: str, *, is_aligned: bool) -> Configuration:
    return Configuration(
        f"masked_cross_entropy/scale {dtype}" + ("" if is_aligned else " unaligned"),
        scale_kernel,
        {
            "gradient_ptr": f"*{dtype}",
            "scale_ptr": "*fp32",
            **dict.fromkeys(("gradient_stride", "width", "blocks_per_row"), "i64"),
        },
        {"BLOCK": _SCALE_BLOCK},
        num_warps=_SCALE_WARPS,
        aligned=frozenset({"gradient_ptr", *(["gradient_stride"] if is_aligned else ())}),
        streams=is_aligned,
    )
