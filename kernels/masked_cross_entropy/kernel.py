"""Loss, accuracy and gradient of rows of logits, each row held in registers: read once, its gradient written once."""

import itertools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.configuration import Configuration, launch_warps

MAX_VOCAB_SIZE = 65_536
_ENTRIES_PER_LOAD = 8  # of each thread: 128 bits of two-byte entries, twice 128 of fp32
_SCALE_BLOCK, _SCALE_WARPS = 8192, 8
_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_NO_COLUMN = tl.constexpr(2**31 - 1)


class Layout(NamedTuple):
    """How a program holds a row: `pieces` blocks, all but the first `full_pieces` masked where the vocabulary ends."""

    block: int
    pieces: int
    full_pieces: int
    num_warps: int
    max_registers: int


def layout(vocab_size: int, is_aligned: bool = True) -> Layout:
    """The layout for a vocabulary of 1 … MAX_VOCAB_SIZE.

    Up to 64 entries a thread in 128 registers, which leaves enough for the arithmetic on every GPU looked at; several
    programs then share a multiprocessor up to 16,384, so that one loads while another computes. Above 32,768 a program
    would need more threads with so many registers than there are, and spills. Rows that do not start at multiples of
    16 bytes are loaded entry by entry, which takes more registers: half as many entries a thread.
    """
    choices = (0, 1, 2, 4, 6, 8)  # pieces: few, so that there are few kernels to compile
    num_warps, most_pieces = 4, 8 if is_aligned else 4
    while num_warps < 32 and vocab_size > most_pieces * num_warps * 32 * _ENTRIES_PER_LOAD:
        num_warps *= 2
    block = num_warps * 32 * _ENTRIES_PER_LOAD
    choice = next(index for index, pieces in enumerate(choices) if pieces * block >= vocab_size)
    return Layout(block, choices[choice], choices[choice - 1], num_warps, 128 if num_warps < 32 else 64)


@triton.jit
def rows_kernel(
    logits_ptr,
    labels_ptr,
    gradient_ptr,
    scale_ptr,
    loss_ptr,
    z_loss_ptr,
    correct_ptr,
    logits_stride,
    gradient_stride,
    vocab_size,
    ignore_index: tl.int64,
    z_loss_weight: tl.float32,
    BLOCK: tl.constexpr,
    PIECES: tl.constexpr,
    FULL_PIECES: tl.constexpr,
    WRITE_GRADIENT: tl.constexpr,
):
    """One program a row. `gradient_ptr` may be `logits_ptr`: a row is in registers before its gradient is written."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row).to(tl.int64)
    logits_ptr += row * logits_stride
    gradient_ptr += row * gradient_stride
    lanes = tl.arange(0, BLOCK)
    if label == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        tl.store(z_loss_ptr + row, 0.0)
        tl.store(correct_ptr + row, 0)
        if WRITE_GRADIENT:
            zeros = tl.zeros([BLOCK], gradient_ptr.dtype.element_ty)
            for piece in tl.static_range(PIECES):
                inside = (lanes < vocab_size - piece * BLOCK) | (piece < FULL_PIECES)
                tl.store(gradient_ptr + piece * BLOCK + lanes, zeros, mask=inside)
        return

    target = tl.load(logits_ptr + label).to(tl.float32)
    logits = ()
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    for piece in tl.static_range(PIECES):
        inside = (lanes < vocab_size - piece * BLOCK) | (piece < FULL_PIECES)
        entries = tl.load(logits_ptr + piece * BLOCK + lanes, mask=inside, other=float("-inf"))
        logits = logits + (entries,)
        largest = tl.maximum(largest, entries.to(tl.float32))
    largest = tl.max(largest, axis=0)

    # the first of equals is the prediction, as in torch.max
    predicted = tl.full([BLOCK], _NO_COLUMN, tl.int32)
    for piece in tl.static_range(PIECES):
        is_largest = logits[piece].to(tl.float32) == largest
        predicted = tl.minimum(predicted, tl.where(is_largest, piece * BLOCK + lanes, _NO_COLUMN))
    predicted = tl.min(predicted, axis=0)
    tl.store(correct_ptr + row, (predicted == label).to(tl.int32))

    total = tl.zeros([BLOCK], tl.float32)
    for piece in tl.static_range(PIECES):
        total += tl.exp(logits[piece].to(tl.float32) - largest)
    total = tl.sum(total, axis=0)
    shifted_lse = tl.log(total)  # counted from the largest logit, so that a confident row's small loss stays exact
    lse = largest + shifted_lse
    tl.store(loss_ptr + row, shifted_lse - (target - largest))
    tl.store(z_loss_ptr + row, lse * lse)

    if WRITE_GRADIENT:
        scale = tl.load(scale_ptr)
        factor = scale * (1 + 2 * z_loss_weight * lse) / total
        column = label.to(tl.int32)
        for piece in tl.static_range(PIECES):
            entries = tl.exp(logits[piece].to(tl.float32) - largest) * factor
            entries = tl.where(lanes == column - piece * BLOCK, entries - scale, entries)
            inside = (lanes < vocab_size - piece * BLOCK) | (piece < FULL_PIECES)
            tl.store(gradient_ptr + piece * BLOCK + lanes, entries.to(gradient_ptr.dtype.element_ty), mask=inside)


@triton.jit
def scale_kernel(gradient_ptr, scale_ptr, gradient_stride, vocab_size, BLOCK: tl.constexpr):
    """Multiply a block of a row by a number on the device; nothing is read or written where that is one."""
    scale = tl.load(scale_ptr)
    if scale == 1.0:
        return
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    pointers = gradient_ptr + tl.program_id(0).to(tl.int64) * gradient_stride + columns
    inside = columns < vocab_size
    entries = tl.load(pointers, mask=inside).to(tl.float32) * scale
    tl.store(pointers, entries.to(gradient_ptr.dtype.element_ty), mask=inside)


def supports(logits: Tensor) -> bool:
    """Whether `rows` can take these logits; PyTorch computes the others."""
    return logits.dtype in _TYPES and logits.shape[1] <= MAX_VOCAB_SIZE and logits.stride(1) == 1


def rows(
    logits: Tensor, labels: Tensor, gradient: Tensor | None, scale: Tensor, ignore_index: int, z_loss_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch `rows_kernel`; the same function as `kernels.masked_cross_entropy.rows.rows`."""
    num_rows, vocab_size = logits.shape
    loss, z_loss = (torch.empty(num_rows, dtype=torch.float32, device=logits.device) for _ in range(2))
    correct = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    target = logits if gradient is None else gradient
    is_aligned = all(tensor.stride(0) % 16 == tensor.data_ptr() % 16 == 0 for tensor in (logits, target))
    block, pieces, full_pieces, num_warps, max_registers = layout(vocab_size, is_aligned)
    if num_rows:
        rows_kernel[(num_rows,)](
            logits,
            labels,
            target,
            scale,
            loss,
            z_loss,
            correct,
            logits.stride(0),
            target.stride(0),
            vocab_size,
            ignore_index,
            z_loss_weight,
            BLOCK=block,
            PIECES=pieces,
            FULL_PIECES=full_pieces,
            WRITE_GRADIENT=gradient is not None,
            num_warps=launch_warps(num_warps),
            **({} if torch.version.hip else {"maxnreg": max_registers}),
        )
    return loss, z_loss, correct


def multiply(gradient: Tensor, scale: Tensor) -> None:
    """Launch `scale_kernel`: gradient [N, V] times a scalar on the device, in place."""
    num_rows, vocab_size = gradient.shape
    if num_rows:
        scale_kernel[(num_rows, triton.cdiv(vocab_size, _SCALE_BLOCK))](
            gradient, scale, gradient.stride(0), vocab_size, BLOCK=_SCALE_BLOCK, num_warps=launch_warps(_SCALE_WARPS)
        )


def configurations() -> list[Configuration]:
    """Every way in which `rows` and `multiply` can start their kernels."""
    found = []
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
    """`is_even`: the vocabulary is a multiple of 16; `is_aligned`: rows start at multiples of 16 entries."""
    block, pieces, full_pieces, num_warps, max_registers = layout(width, is_aligned)
    pointers = {"logits_ptr": f"*{dtype}", "labels_ptr": "*i64", "gradient_ptr": f"*{dtype}", "scale_ptr": "*fp32"}
    pointers |= {"loss_ptr": "*fp32", "z_loss_ptr": "*fp32", "correct_ptr": "*i32"}
    strides = {"logits_stride": "i32", "gradient_stride": "i32"}
    kind = "" if write_gradient else " loss only"
    kind += ("" if is_even else " odd V") if is_aligned else " unaligned"
    return Configuration(
        f"masked_cross_entropy/rows {dtype} V={width}{kind}",
        rows_kernel,
        {**pointers, **strides, "vocab_size": "i32", "ignore_index": "i64", "z_loss_weight": "fp32"},
        {"BLOCK": block, "PIECES": pieces, "FULL_PIECES": full_pieces, "WRITE_GRADIENT": write_gradient},
        num_warps=num_warps,
        max_registers=max_registers,
        aligned=frozenset(
            ["logits_ptr", "gradient_ptr", *(strides if is_aligned else ()), *(["vocab_size"] if is_even else ())]
        ),
        streams=is_aligned and (is_even or full_pieces > 0),
        # above 32,768 see `layout`; sm_100 also spills 120 bytes for narrow entries loaded one by one
        may_spill=width > 32768 or (width > 16384 and not is_aligned and dtype != "fp32"),
    )


def _scale_configuration(dtype: str, *, is_aligned: bool) -> Configuration:
    return Configuration(
        f"masked_cross_entropy/scale {dtype}" + ("" if is_aligned else " unaligned"),
        scale_kernel,
        {"gradient_ptr": f"*{dtype}", "scale_ptr": "*fp32", "gradient_stride": "i32", "vocab_size": "i32"},
        {"BLOCK": _SCALE_BLOCK},
        num_warps=_SCALE_WARPS,
        aligned=frozenset({"gradient_ptr", *(("gradient_stride", "vocab_size") if is_aligned else ())}),
        streams=is_aligned,
    )
