"""Layer weighting in Triton: bias, dropout, residual connection, mix and LayerNorm in one pass, and their backward.

    y_n = x_{n−1} + dropout(out_n + bias),  x_n = Σ_{m≤n} α_{n,m}·y_m,  h_n = LayerNorm(x_n),  y_0 = x_0

Letters of shapes: R rows (B·T), D hidden, N = R·D, M mixes. One buffer holds the y_m, and in the backward ∂x_n in the
place of y_{n+G}, which has no further use then. All weights stand side by side: α_n from (n − 1)(n + 2)/2 on.

Mixes come in groups of G. What representations of earlier groups contribute to each mix of a group is summed for all
of them in one pass over those representations (`combine_kernel`), in fp32; a mix then reads its own group's and that
partial sum. In the backward likewise, from the last group to the first. Every mix for itself would read Σ n
representations: for 24 mixes 2.5 times the bytes.
"""

from dataclasses import replace
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.configuration import Configuration, launch_warps
from kernels.depth_mix import gram_kernel
from kernels.depth_mix.fused import GROUP
from kernels.depth_mix.gram_kernel import row_of, weight_gradients
from kernels.dropout_hash import first_words, keep_arguments, keep_mask
from kernels.whole_rows import ROWS, launch_rows

_G = tl.constexpr(GROUP)
NUM_WARPS = 4
# what the check launches: rows, D, number of mixes, dropout; one group and several, D of whole words and not
CHECKED = ((5, 16, 1, True), (8, 40, 6, True), (18, 40, 14, True), (4, 40, 7, False))
# ptxas limits the backward without dropout, in training that of y_0 alone, to 96 registers, so that it spills
_MOST_SPILLED = {"forward_kernel": {}, "backward_kernel": {"sm_90": 8}}
COMBINE_BLOCK = 512  # elements of a program
COMBINE_WARPS = 2
PROGRAMS = 528  # of the backward; fixed, so that sums do not depend on the GPU


@triton.jit
def _weight(alpha_ptr, depth, m, end, BACKWARD: tl.constexpr):
    """Weight of representation m in x_depth, or in the backward of ∂x_m in ∂y_depth; 0 from m = `end` on."""
    place = row_of(m) + depth if BACKWARD else row_of(depth) + m
    return tl.load(alpha_ptr + place, mask=m < end, other=0.0)


@triton.jit
def _representations(values_ptr, slot_stride, start, end, offsets, is_inside):
    """G representations from `start` on, zeros from `end` on: all loads before a use, so all are under way at once."""
    values = ()
    for index in tl.static_range(_G):
        m = start + index
        values += (tl.load(values_ptr + m * slot_stride + offsets, mask=is_inside & (m < end), other=0.0),)
    return values


@triton.jit
def _weighted(values, alpha_ptr, depth, start, end, BACKWARD: tl.constexpr):
    """Sum of G representations in fp32, each with its weight."""
    total = _weight(alpha_ptr, depth, start, end, BACKWARD) * values[0].to(tl.float32)
    for index in tl.static_range(1, _G):
        total += _weight(alpha_ptr, depth, start + index, end, BACKWARD) * values[index].to(tl.float32)
    return total


_FREE = ["rows", "depth", "first", "last", "partial", "has_bias", "has_partial", "has_x", "has_h", "threshold"]


@triton.jit(do_not_specialize=_FREE, do_not_specialize_on_alignment=["seed_ptr"])
def forward_kernel(
    out_ptr, bias_ptr, x_ptr, alpha_ptr, seed_ptr, values_ptr, partials_ptr, mixed_ptr, normalized_ptr, inverse_std_ptr,
    slot_stride: tl.int64, rows, size, depth, first, partial, has_bias, has_partial, threshold,
    keep_scale: tl.float32, eps: tl.float32,
    HAS_DROPOUT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows of x_n and h_n. Depth 0 has no output of a sub-layer: x is y_0, and its own mix.

    The group's older representations are first … depth − 1; `partial` is the place of the others' sum.
    """
    # 1. Begin all loads: the sub-layer's output, x_{n−1}, older representations of the group, the others' sum.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    is_inside = (row < rows)[:, None] & (columns < size)[None, :]
    offsets = row[:, None] * size + columns[None, :]
    is_mix = depth > 0
    output = tl.load(out_ptr + offsets, mask=is_inside & is_mix, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + offsets, mask=is_inside, other=0.0).to(tl.float32)
    older = _representations(values_ptr, slot_stride, first, depth, offsets, is_inside)
    mixed = tl.load(partials_ptr + partial * slot_stride + offsets, mask=is_inside & (has_partial != 0), other=0.0)
    # 2. y_n = x_{n−1} + dropout(out + bias), in fp32; stored in the buffer's dtype.
    bias = tl.load(bias_ptr + columns, mask=(columns < size) & (has_bias != 0), other=0.0)
    output += bias.to(tl.float32)[None, :]
    if HAS_DROPOUT:
        kept = keep_mask(first_words(offsets, seed_ptr), seed_ptr, threshold)
        output = tl.where(kept, output * keep_scale, 0.0)
    newest = x + output
    tl.store(values_ptr + depth * slot_stride + offsets, newest, mask=is_inside)
    # 3. x_n: the older ones rounded, y_n in fp32.
    mixed += _weighted(older, alpha_ptr, depth, first, depth, False)
    mixed += tl.load(alpha_ptr + row_of(depth) + depth, mask=is_mix, other=1.0) * newest
    tl.store(mixed_ptr + offsets, mixed, mask=is_inside & is_mix)
    # 4. h_n = LayerNorm(x_n), and 1/σ for the backward.
    mean = tl.sum(mixed, axis=1) / size
    centered = tl.where(is_inside, mixed - mean[:, None], 0.0)
    inverse_std = tl.rsqrt(tl.sum(centered * centered, axis=1) / size + eps)
    normalized = centered * inverse_std[:, None]
    tl.store(normalized_ptr + offsets, normalized, mask=is_inside)
    tl.store(inverse_std_ptr + row, inverse_std, mask=row < rows)


@triton.jit(do_not_specialize=_FREE, do_not_specialize_on_alignment=["seed_ptr"])
def backward_kernel(
    grad_x_ptr, grad_h_ptr, normalized_ptr, inverse_std_ptr, alpha_ptr, seed_ptr, values_ptr, partials_ptr,
    grad_newest_ptr, grad_out_ptr, bias_parts_ptr,
    slot_stride: tl.int64, rows, size, depth, last, partial, has_bias, has_partial, has_x, has_h, threshold,
    keep_scale: tl.float32,
    HAS_DROPOUT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """∂x_n with its part through h_n, ∂y_n and ∂out_n, for every num_programs-th ROWS rows; ∂bias's part of them.

    The group's deeper gradients are those of x_{n+1} … x_last; `partial` is the place of the sum of deeper groups'.
    """
    columns = tl.arange(0, BLOCK)
    is_mix = depth > 0
    deeper_ptr = values_ptr + _G * slot_stride  # ∂x_m, at the place of y_{m+G}
    own_weight = tl.load(alpha_ptr + row_of(depth) + depth, mask=is_mix, other=1.0)
    bias_sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        # 1. Begin all loads.
        row = start + tl.arange(0, ROWS)
        is_inside = (row < rows)[:, None] & (columns < size)[None, :]
        offsets = row[:, None] * size + columns[None, :]
        grad = tl.load(grad_x_ptr + offsets, mask=is_inside & (has_x != 0), other=0.0).to(tl.float32)
        of_h = tl.load(grad_h_ptr + offsets, mask=is_inside & (has_h != 0), other=0.0).to(tl.float32)
        h = tl.load(normalized_ptr + offsets, mask=is_inside & (has_h != 0), other=0.0).to(tl.float32)
        inverse_std = tl.load(inverse_std_ptr + row, mask=(row < rows) & (has_h != 0), other=0.0)
        deeper = _representations(deeper_ptr, slot_stride, depth + 1, last + 1, offsets, is_inside)
        newest = tl.load(partials_ptr + partial * slot_stride + offsets, mask=is_inside & (has_partial != 0), other=0.0)
        # 2. ∂x_n = what comes from the next y, and LayerNorm's: (∂h − mean(∂h) − h · mean(∂h · h)) / σ.
        mean = tl.sum(of_h, axis=1) / size
        along_h = tl.sum(of_h * h, axis=1) / size
        of_x = inverse_std[:, None] * (of_h - mean[:, None] - h * along_h[:, None])
        grad += tl.where(is_inside, of_x, 0.0)
        rounded = grad.to(values_ptr.dtype.element_ty)
        tl.store(deeper_ptr + depth * slot_stride + offsets, rounded, mask=is_inside & is_mix)
        # 3. ∂y_n = Σ_{k≥n} α_{k,n}·∂x_k, which is also the gradient of x_{n−1}.
        newest += _weighted(deeper, alpha_ptr, depth, depth + 1, last + 1, True) + own_weight * grad
        tl.store(grad_newest_ptr + offsets, newest, mask=is_inside)
        # 4. ∂out_n: through the same mask of dropout.
        if HAS_DROPOUT:
            kept = keep_mask(first_words(offsets, seed_ptr), seed_ptr, threshold)
            newest = tl.where(kept, newest * keep_scale, 0.0)
        tl.store(grad_out_ptr + offsets, newest, mask=is_inside & is_mix)
        bias_sums += newest
    sums = tl.sum(bias_sums, axis=0)
    tl.store(bias_parts_ptr + tl.program_id(0) * size + columns, sums, mask=(columns < size) & (has_bias != 0))


@triton.jit(do_not_specialize=["first", "end", "depth"])
def combine_kernel(
    values_ptr, alpha_ptr, partials_ptr, slot_stride: tl.int64, first, end, depth,
    OUTPUTS: tl.constexpr, BACKWARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of representations first … end − 1 with the weights of depth, depth + 1, … depth + OUTPUTS − 1, fp32."""
    # 1. This program's elements; one sum of them for each output.
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_inside = offsets < slot_stride
    if BACKWARD:
        values_ptr += _G * slot_stride
    sums = ()
    for _ in tl.static_range(OUTPUTS):
        sums += (tl.zeros([BLOCK], tl.float32),)
    # 2. G representations at a time, read once for all outputs.
    for start in range(first, end, _G):
        values = _representations(values_ptr, slot_stride, start, end, offsets, is_inside)
        added = ()
        for output in tl.static_range(OUTPUTS):
            added += (sums[output] + _weighted(values, alpha_ptr, depth + output, start, end, BACKWARD),)
        sums = added
    for output in tl.static_range(OUTPUTS):
        tl.store(partials_ptr + output * slot_stride + offsets, sums[output], mask=is_inside)


def forward(
    out: Tensor | None,
    bias: Tensor | None,
    x: Tensor,
    alpha: Tensor,
    seed: Tensor | None,
    values: Tensor,
    partials: Tensor,
    mixed: Tensor,
    normalized: Tensor,
    inverse_std: Tensor,
    depth: int,
    num_mixes: int,
    dropout_prob: float,
    eps: float,
) -> None:
    """`kernels.depth_mix.fused.forward` for contiguous tensors.

    Raises:
        ValueError: 2³¹ elements or more; places within a representation are int32, which takes fewer registers.
    """
    rows, size = x.shape
    if rows * size >= 2**31:
        raise ValueError(f"depth_mix: {rows} rows of {size} are 2³¹ elements or more; use a smaller batch")
    begin, first = _group(depth), 0
    has_partial = begin > 1
    with torch.cuda.device_of(x):
        if has_partial:
            first = begin
            if depth == begin:
                _combine(values, alpha, partials, 0, begin, begin, min(GROUP, num_mixes - begin + 1), backward=False)
        forward_kernel[(triton.cdiv(rows, launch_rows()),)](
            x if out is None else out, alpha if bias is None else bias, x, alpha, alpha if seed is None else seed,
            values, partials, mixed, normalized, inverse_std,
            rows * size, rows, size, depth, first, depth - begin, int(bias is not None), int(has_partial),
            *keep_arguments(seed, dropout_prob), eps,
            **_constants(size, launch_rows(), has_dropout=seed is not None), num_warps=launch_warps(NUM_WARPS),
        )  # fmt: skip


def backward(
    grad_x: Tensor | None,
    grad_h: Tensor | None,
    normalized: Tensor,
    inverse_std: Tensor,
    alpha: Tensor,
    seed: Tensor | None,
    values: Tensor,
    partials: Tensor,
    grad_newest: Tensor,
    grad_out: Tensor | None,
    grad_bias: Tensor | None,
    grad_alpha: Tensor,
    depth: int,
    num_mixes: int,
    dropout_prob: float,
) -> None:
    """`kernels.depth_mix.fused.backward` for contiguous tensors."""
    rows, size = normalized.shape
    begin, last = _group(depth), min(_group(depth) + GROUP - 1, num_mixes)
    lowest = begin if begin > 1 else 0  # of the group; y_0 counts to the first
    has_partial, programs = last < num_mixes, min(triton.cdiv(rows, launch_rows()), PROGRAMS)
    bias_parts = normalized.new_empty(programs if grad_bias is not None else 0, size, dtype=torch.float32)
    with torch.cuda.device_of(normalized):
        if has_partial and depth == last:
            _combine(values, alpha, partials, last + 1, num_mixes + 1, lowest, last - lowest + 1, backward=True)
        backward_kernel[(programs,)](
            grad_newest if grad_x is None else grad_x, normalized if grad_h is None else grad_h,
            normalized, inverse_std, alpha, alpha if seed is None else seed, values, partials,
            grad_newest, normalized if grad_out is None else grad_out, bias_parts,
            rows * size, rows, size, depth, last, depth - lowest, int(grad_bias is not None), int(has_partial),
            int(grad_x is not None), int(grad_h is not None), *keep_arguments(seed, dropout_prob),
            **_constants(size, launch_rows(), has_dropout=seed is not None), num_warps=launch_warps(NUM_WARPS),
        )  # fmt: skip
        if grad_bias is not None:
            torch.sum(bias_parts, dim=0, out=grad_bias)
        if depth and depth == begin:
            weight_gradients(values, grad_alpha, begin, last, PROGRAMS)


def _group(depth: int) -> int:
    """The first mix of a mix's group; y_0 counts to the first group."""
    return max(depth - 1, 0) // GROUP * GROUP + 1


def _combine(
    values: Tensor, alpha: Tensor, partials: Tensor, first: int, end: int, depth: int, outputs: int, *, backward: bool
) -> None:
    size = values.shape[1]
    combine_kernel[(triton.cdiv(size, COMBINE_BLOCK),)](
        values, alpha, partials, size, first, end, depth,
        OUTPUTS=outputs, BACKWARD=backward, BLOCK=COMBINE_BLOCK, num_warps=launch_warps(COMBINE_WARPS),
    )  # fmt: skip


def _constants(size: int, rows: int, *, has_dropout: bool) -> dict[str, Any]:
    return {"HAS_DROPOUT": has_dropout, "ROWS": rows, "BLOCK": triton.next_power_of_2(size)}


def configurations() -> list[Configuration]:
    """Variants of published shapes, of fp32, and of the check; each D has code of its own, and y_0 no dropout.

    y_0, which comes from the embedding, is fp32 also where all else is bf16.
    """
    mixes = [
        _mix_configuration(kernel, size, dtype, has_dropout=has_dropout)
        for kernel in (forward_kernel, backward_kernel)
        for size, dtype in (
            (768, "bf16"),
            (384, "bf16"),
            (768, "fp32"),
            *product(sorted({size for _, size, *_ in CHECKED}), ("bf16", "fp32")),
        )
        for has_dropout in (True, False)
    ]
    mixes += [
        replace(mix, name=f"{mix.name} of y_0", types={**mix.types, "out_ptr": "*fp32"})
        for mix in mixes
        if mix.kernel is forward_kernel and mix.types["out_ptr"] == "*bf16" and not mix.constants["HAS_DROPOUT"]
    ]
    combinations = [
        Configuration(
            f"depth_mix/combine{' backward' if is_backward else ''} {outputs} {dtype}",
            combine_kernel,
            _types(combine_kernel, dtype),
            {"OUTPUTS": outputs, "BACKWARD": is_backward, "BLOCK": COMBINE_BLOCK},
            num_warps=COMBINE_WARPS,
            aligned=_aligned(combine_kernel),
        )
        for dtype in ("bf16", "fp32")
        for outputs, is_backward in ((GROUP, False), (1, False), (2, False), (GROUP, True), (GROUP + 1, True))
    ]
    return [*mixes, *combinations, *gram_kernel.configurations()]


def _mix_configuration(kernel: Any, size: int, dtype: str, *, has_dropout: bool) -> Configuration:
    return Configuration(
        f"depth_mix/{kernel.__name__.removesuffix('_kernel')} {dtype} D={size}{' dropout' if has_dropout else ''}",
        kernel,
        _types(kernel, dtype) | ({} if has_dropout else {"seed_ptr": "*fp32"}),
        _constants(size, ROWS, has_dropout=has_dropout),
        num_warps=NUM_WARPS,
        aligned=_aligned(kernel) - (set() if size % 16 == 0 else {"size"}),
        streams=size >= NUM_WARPS * 32,  # smaller ones have less than a word for each thread
        most_spilled={} if has_dropout else _MOST_SPILLED[kernel.__name__],
    )


def _aligned(kernel: Any) -> frozenset[str]:
    """Arguments divisible by 16: D, and so the distance of slots; tensors of their own."""
    return frozenset(
        name
        for name in kernel.arg_names
        if name in {"slot_stride", "size"} or (name.endswith("_ptr") and name != "seed_ptr")
    )


def _types(kernel: Any, dtype: str) -> dict[str, str]:
    """Types of a kernel's run-time arguments: `dtype` of what is kept for the backward, fp32 of the rest."""
    narrow = ("out_ptr", "values_ptr", "normalized_ptr", "grad_h_ptr", "grad_out_ptr")
    kinds = {"seed_ptr": "*i32", "slot_stride": "i64", "keep_scale": "fp32", "eps": "fp32"}
    kinds |= dict.fromkeys(narrow, f"*{dtype}")
    constants = {"HAS_DROPOUT", "ROWS", "BLOCK", "OUTPUTS", "BACKWARD"}
    return {
        name: kinds.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
        if name not in constants
    }
