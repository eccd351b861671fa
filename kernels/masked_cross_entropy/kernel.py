"""Loss, accuracy and gradient of rows of logits, each row held in registers: read once, its gradient written once."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.configuration import Configuration, fitting_warps

MAX_VOCAB_SIZE = 65_536
_PIECE = 8192  # entries that all threads load together: 8 of two bytes for each of 1,024
_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_NO_COLUMN = tl.constexpr(2**31 - 1)


class Layout(NamedTuple):
    """How a program holds a row: `pieces` blocks, the last one masked where the vocabulary ends."""

    block: int
    pieces: int
    num_warps: int
    max_registers: int | None


def layout(vocab_size: int) -> Layout:
    """The layout for a vocabulary of 1 … MAX_VOCAB_SIZE.

    Registers decide: the limits let two or three programs share a multiprocessor up to 16,384, so that one loads while
    another computes, and above that 1,024 threads take all registers there are.
    """
    if vocab_size <= _PIECE:
        block = max(1024, triton.next_power_of_2(vocab_size))
        return Layout(block, 1, max(4, block // 512), 40 if block == _PIECE else None)
    pieces = triton.cdiv(vocab_size, _PIECE)
    return Layout(_PIECE, pieces, 16, 64) if pieces == 2 else Layout(_PIECE, pieces, 32, 64)


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
                columns = piece * BLOCK + lanes
                tl.store(gradient_ptr + columns, zeros, mask=columns < vocab_size)
        return

    target = tl.load(logits_ptr + label).to(tl.float32)
    logits = ()
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    for piece in tl.static_range(PIECES):
        columns = piece * BLOCK + lanes
        entries = tl.load(logits_ptr + columns, mask=columns < vocab_size, other=float("-inf"))
        logits = logits + (entries,)
        largest = tl.maximum(largest, entries.to(tl.float32))
    largest = tl.max(largest, axis=0)

    total = tl.zeros([BLOCK], tl.float32)
    predicted = tl.full([BLOCK], _NO_COLUMN, tl.int32)
    for piece in tl.static_range(PIECES):
        entries = logits[piece].to(tl.float32)
        total += tl.exp(entries - largest)
        predicted = tl.minimum(predicted, tl.where(entries == largest, piece * BLOCK + lanes, _NO_COLUMN))
    total = tl.sum(total, axis=0)
    predicted = tl.min(predicted, axis=0)  # the first of equals, as in torch.max

    shifted_lse = tl.log(total)  # counted from the largest logit, so that a confident row's small loss stays exact
    lse = largest + shifted_lse
    tl.store(loss_ptr + row, shifted_lse - (target - largest))
    tl.store(z_loss_ptr + row, lse * lse)
    tl.store(correct_ptr + row, (predicted == label).to(tl.int32))
    if WRITE_GRADIENT:
        scale = tl.load(scale_ptr)
        factor = scale * (1 + 2 * z_loss_weight * lse) / total
        for piece in tl.static_range(PIECES):
            columns = piece * BLOCK + lanes
            entries = tl.exp(logits[piece].to(tl.float32) - largest) * factor
            entries = tl.where(columns == label, entries - scale, entries)
            tl.store(gradient_ptr + columns, entries.to(gradient_ptr.dtype.element_ty), mask=columns < vocab_size)


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
    block, pieces, num_warps, max_registers = layout(vocab_size)
    target = logits if gradient is None else gradient
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
            WRITE_GRADIENT=gradient is not None,
            num_warps=fitting_warps(num_warps, 64 if torch.version.hip else 32),
            maxnreg=None if torch.version.hip else max_registers,
        )
    return loss, z_loss, correct


def multiply(gradient: Tensor, scale: Tensor) -> None:
    """Launch `scale_kernel`: gradient [N, V] times a scalar on the device, in place."""
    num_rows, vocab_size = gradient.shape
    if num_rows:
        scale_kernel[(num_rows, triton.cdiv(vocab_size, _PIECE))](
            gradient, scale, gradient.stride(0), vocab_size, BLOCK=_PIECE, num_warps=8
        )


def configurations() -> list[Configuration]:
    """Every way in which `rows` and `multiply` can start their kernels on aligned rows, and one on rows that are not."""
    found = []
    widths = [1024, 2048, 4096, *range(_PIECE, MAX_VOCAB_SIZE + 1, _PIECE)]
    for dtype in _TYPES.values():
        for width in widths:
            found += [_rows_configuration(dtype, width, write_gradient=write) for write in (True, False)]
        found.append(_rows_configuration(dtype, 4 * _PIECE, write_gradient=True, is_aligned=False))
        found.append(
            Configuration(
                f"masked_cross_entropy/scale {dtype}",
                scale_kernel,
                {
                    "gradient_ptr": f"*{dtype}",
                    "scale_ptr": "*fp32",
                    "gradient_stride": "i32",
                    "vocab_size": "i32",
                },
                {"BLOCK": _PIECE},
                num_warps=8,
                aligned=frozenset({"gradient_ptr", "gradient_stride", "vocab_size", "scale_ptr"}),
            )
        )
    return found


def _rows_configuration(dtype: str, width: int, *, write_gradient: bool, is_aligned: bool = True) -> Configuration:
    block, pieces, num_warps, max_registers = layout(width)
    pointers = {"logits_ptr": f"*{dtype}", "labels_ptr": "*i64", "gradient_ptr": f"*{dtype}", "scale_ptr": "*fp32"}
    pointers |= {"loss_ptr": "*fp32", "z_loss_ptr": "*fp32", "correct_ptr": "*i32"}
    strides = {"logits_stride": "i32", "gradient_stride": "i32", "vocab_size": "i32"}
    name = f"masked_cross_entropy/rows {dtype} V={width}" + ("" if write_gradient else " loss only")
    return Configuration(
        name if is_aligned else f"{name} unaligned",
        rows_kernel,
        {**pointers, **strides, "ignore_index": "i64", "z_loss_weight": "fp32"},
        {"BLOCK": block, "PIECES": pieces, "WRITE_GRADIENT": write_gradient},
        num_warps=num_warps,
        max_registers=max_registers,
        aligned=frozenset(pointers) | (frozenset(strides) if is_aligned else frozenset()),
        streams=is_aligned,
        may_spill=width > 4 * _PIECE,  # a row of 40,960 and more does not fit beside its arithmetic; spills stay in L1/L2
    )
