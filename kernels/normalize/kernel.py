"""LayerNorm in Triton with what surrounds it in the embedding and in the head, forward and backward in one pass each.

The embedding: rows of a table, LayerNorm, dropout. The head: GELU, LayerNorm, dropout. Letters of shapes: R rows, D
columns, V rows of a table. A program has whole rows; the backward computes them again from the input, so nothing else
is kept for it. Gradients of the embedding's rows can be added to a gradient of the table that exists.
"""

from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.configuration import Configuration, launch_warps
from kernels.dropout_hash import first_words, keep_arguments, keep_mask
from kernels.gelu import gelu_share, gelu_slope
from kernels.whole_rows import ROWS, launch_rows

# what the check launches: R, D, whether it is the embedding or the head, whether there is dropout
CHECKED = ((5, 16, True, True), (18, 40, False, True), (3, 300, False, False), (4, 40, True, False))
_FREE = ["rows", "threshold"]
ADDED_ROWS, ADDED_BLOCK, ADDED_WARPS = 32, 256, 8  # gradients in a group, columns and warps of a program


@triton.jit
def _load_rows(x_ptr, ids_ptr, row, columns, rows, size, GATHERS: tl.constexpr):
    """Rows of the input in fp32, [ROWS, BLOCK], and which elements are inside."""
    is_row = row < rows
    source = row
    if GATHERS:
        source = tl.load(ids_ptr + row, mask=is_row, other=0).to(tl.int64)
    is_inside = is_row[:, None] & (columns < size)[None, :]
    x = tl.load(x_ptr + source[:, None] * size + columns[None, :], mask=is_inside, other=0.0)
    return x.to(tl.float32), is_inside


@triton.jit
def _normalized(x, is_inside, size, eps):
    """LayerNorm of rows, and 1/σ [ROWS, 1]."""
    mean = tl.sum(x, axis=1) / size
    centered = tl.where(is_inside, x - mean[:, None], 0.0)
    inverse_std = tl.rsqrt(tl.sum(centered * centered, axis=1) / size + eps)[:, None]
    return centered * inverse_std, inverse_std


@triton.jit
def _dropped(x, row, columns, size, seed_ptr, threshold, keep_scale):
    kept = keep_mask(first_words(row[:, None] * size + columns[None, :], seed_ptr), seed_ptr, threshold)
    return tl.where(kept, x * keep_scale, 0.0)


@triton.jit(do_not_specialize=_FREE, do_not_specialize_on_alignment=["seed_ptr"])
def forward_kernel(
    x_ptr, ids_ptr, seed_ptr, result_ptr, rows, size, threshold, keep_scale: tl.float32, eps: tl.float32,
    GATHERS: tl.constexpr, HAS_DROPOUT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows of dropout(LayerNorm(x)), with x the rows of a table or GELU of the input."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    x, is_inside = _load_rows(x_ptr, ids_ptr, row, columns, rows, size, GATHERS)
    if not GATHERS:
        x = x * gelu_share(x, False)
    result, _ = _normalized(x, is_inside, size, eps)
    if HAS_DROPOUT:
        result = _dropped(result, row, columns, size, seed_ptr, threshold, keep_scale)
    places = row[:, None] * size + columns[None, :]
    tl.store(result_ptr + places, result, mask=is_inside)


@triton.jit(do_not_specialize=_FREE, do_not_specialize_on_alignment=["seed_ptr"])
def backward_kernel(
    grad_ptr, x_ptr, ids_ptr, seed_ptr, of_x_ptr, rows, size, threshold, keep_scale: tl.float32, eps: tl.float32,
    GATHERS: tl.constexpr, HAS_DROPOUT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows of the gradient of the input, or of the rows taken from the table."""
    # 1. Begin all loads.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    x, is_inside = _load_rows(x_ptr, ids_ptr, row, columns, rows, size, GATHERS)
    places = row[:, None] * size + columns[None, :]
    grad = tl.load(grad_ptr + places, mask=is_inside, other=0.0).to(tl.float32)
    # 2. The rows again.
    activation = x
    if not GATHERS:
        share = gelu_share(x, False)
        activation = x * share
    normalized, inverse_std = _normalized(activation, is_inside, size, eps)
    # 3. Back through dropout, LayerNorm and GELU.
    if HAS_DROPOUT:
        grad = _dropped(grad, row, columns, size, seed_ptr, threshold, keep_scale)
    mean = (tl.sum(grad, axis=1) / size)[:, None]
    along = (tl.sum(grad * normalized, axis=1) / size)[:, None]
    of_x = inverse_std * (grad - mean - normalized * along)
    if not GATHERS:
        of_x = of_x * gelu_slope(x, share, False)
    tl.store(of_x_ptr + places, of_x, mask=is_inside)


@triton.jit(do_not_specialize=["rows"])
def add_rows_kernel(
    grad_ptr, ids_ptr, order_ptr, table_ptr, parts_ptr, rows, size, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Add all gradients [R, D] of an id to its row of the table [V, D]; `order` has the places of the sorted ids.

    Places come in groups of ROWS. The program at an id's first place in a group adds all of them; those at its other
    places have nothing to do. If the id has places in other groups too, the sum is a part, left for `add_parts_kernel`:
    of each group at most the last id's that begins there, and the first's that began before.
    """
    # 1. Whether this is an id's first place, in all or in the group.
    first = tl.program_id(0)
    own = tl.load(ids_ptr + first)
    begins = tl.load(ids_ptr + first - 1, mask=first > 0, other=-1) != own
    if begins | (first % ROWS == 0):
        # 2. The sum of its gradients in the group.
        group = first // ROWS
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        is_column = columns < size
        places = group * ROWS + tl.arange(0, ROWS)
        is_own = (places >= first) & (tl.load(ids_ptr + places, mask=places < rows, other=-1) == own)
        source = tl.load(order_ptr + places, mask=is_own, other=0)
        offsets = source[:, None] * size + columns[None, :]
        grad = tl.load(grad_ptr + offsets, mask=is_own[:, None] & is_column[None, :], other=0.0)
        total = tl.sum(grad, axis=0)
        # 3. Added to the table, or a part.
        following = (group + 1) * ROWS
        goes_on = tl.load(ids_ptr + following, mask=following < rows, other=-1) == own
        if begins & (goes_on == 0):
            target_ptr = table_ptr + own * size + columns
            tl.store(target_ptr, tl.load(target_ptr, mask=is_column, other=0.0) + total, mask=is_column)
        else:
            part = 2 * group + begins.to(tl.int32)
            tl.store(parts_ptr + part.to(tl.int64) * size + columns, total, mask=is_column)


@triton.jit(do_not_specialize=["rows"])
def add_parts_kernel(ids_ptr, table_ptr, parts_ptr, rows, size, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Add the parts of an id to its row of the table, in their order: the program of the group where the id begins."""
    group = tl.program_id(0)
    following = (group + 1) * ROWS
    own = tl.load(ids_ptr + following, mask=following < rows, other=-1)  # of the next group's first place
    before = tl.load(ids_ptr + following - 1, mask=following < rows, other=-2)
    since = tl.load(ids_ptr + group * ROWS)
    earlier = tl.load(ids_ptr + group * ROWS - 1, mask=group > 0, other=-1)
    if (own == before) & ((since != own) | (earlier != own)):
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        is_column = columns < size
        last = tl.load(parts_ptr + (2 * group + 1).to(tl.int64) * size + columns, mask=is_column, other=0.0)
        # ROWS groups at a time, until one begins with another id
        sums = tl.zeros([ROWS, BLOCK], tl.float32)
        goes_on = own == before
        while goes_on:
            groups = group + 1 + tl.arange(0, ROWS)
            places = groups.to(tl.int64) * ROWS
            is_own = tl.load(ids_ptr + places, mask=places < rows, other=-1) == own
            offsets = (2 * groups[:, None]).to(tl.int64) * size + columns[None, :]
            sums += tl.load(parts_ptr + offsets, mask=is_own[:, None] & is_column[None, :], other=0.0)
            goes_on = tl.sum(is_own.to(tl.int32), axis=0) == ROWS
            group += ROWS
        target_ptr = table_ptr + own * size + columns
        total = tl.load(target_ptr, mask=is_column, other=0.0) + (last + tl.sum(sums, axis=0))
        tl.store(target_ptr, total, mask=is_column)


def forward(x: Tensor, ids: Tensor | None, seed: Tensor | None, dropout_prob: float, eps: float) -> Tensor:
    """Launch `forward_kernel`.

    Args:
        x: [R, D], of which GELU is taken; with ids a table [V, D]; contiguous.
        ids: [R] integers, rows of the table, or None.
        seed: [2] int32, of dropout, or None.
        dropout_prob: probability of a zero.
        eps: of LayerNorm.

    Returns:
        [R, D] in the dtype of x.
    """
    rows, size = len(x if ids is None else ids), x.shape[1]
    result = x.new_empty(rows, size)
    if rows:
        with torch.cuda.device_of(x):
            forward_kernel[(triton.cdiv(rows, launch_rows()),)](
                *_pointers(x, ids, seed), result, rows, size, *keep_arguments(seed, dropout_prob), eps,
                **_constants(size, launch_rows(), gathers=ids is not None, has_dropout=seed is not None),
                num_warps=launch_warps(_num_warps(size)),
            )  # fmt: skip
    return result


def backward(
    grad: Tensor, x: Tensor, ids: Tensor | None, seed: Tensor | None, dropout_prob: float, eps: float
) -> Tensor:
    """Launch `backward_kernel`: of the result's gradient [R, D] to that of x, or of its rows, [R, D] in its dtype."""
    rows, size = grad.shape
    of_x = x.new_empty(rows, size)
    if rows:
        with torch.cuda.device_of(x):
            backward_kernel[(triton.cdiv(rows, launch_rows()),)](
                grad, *_pointers(x, ids, seed), of_x, rows, size, *keep_arguments(seed, dropout_prob), eps,
                **_constants(size, launch_rows(), gathers=ids is not None, has_dropout=seed is not None),
                num_warps=launch_warps(_num_warps(size)),
            )  # fmt: skip
    return of_x


def add_rows(table: Tensor, ids: Tensor, grad: Tensor) -> None:
    """Sort the ids [R], and launch both kernels for gradients [R, D] and a table [V, D], both fp32."""
    rows, size = grad.shape
    if not rows:
        return
    ids, order = ids.sort(stable=True)  # the same order of additions each time
    groups, blocks = triton.cdiv(rows, ADDED_ROWS), triton.cdiv(size, ADDED_BLOCK)
    parts = grad.new_empty(2 * groups, size)
    options = {"ROWS": ADDED_ROWS, "BLOCK": ADDED_BLOCK, "num_warps": launch_warps(ADDED_WARPS)}
    with torch.cuda.device_of(table):
        add_rows_kernel[(rows, blocks)](grad, ids, order, table, parts, rows, size, **options)
        add_parts_kernel[(groups, blocks)](ids, table, parts, rows, size, **options)


def _pointers(x: Tensor, ids: Tensor | None, seed: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Input, ids and seed; the input in the place of what is missing."""
    return x, x if ids is None else ids, x if seed is None else seed


def _num_warps(size: int) -> int:
    """Warps with 8 elements a thread, a word of 128 bits in bf16."""
    return min(16, max(1, triton.next_power_of_2(size) // 256))


def _constants(size: int, rows: int, *, gathers: bool, has_dropout: bool) -> dict[str, Any]:
    return {"GATHERS": gathers, "HAS_DROPOUT": has_dropout, "ROWS": rows, "BLOCK": triton.next_power_of_2(size)}


def configurations() -> list[Configuration]:
    """Variants of published shapes and of the check: the embedding's rows are fp32, the head's in the run's dtype."""
    cases = [(size, gathers, True) for size in (768, 384) for gathers in (True, False)]
    cases += [case[1:] for case in CHECKED]
    found = [
        _configuration(kernel, dtype, size, gathers=gathers, has_dropout=has_dropout)
        for kernel, dtype in product((forward_kernel, backward_kernel), ("bf16", "fp32"))
        for size, gathers, has_dropout in cases
        if dtype == "fp32" or not gathers
    ]
    kinds = {"ids_ptr": "*i64", "order_ptr": "*i64", "rows": "i32", "size": "i32"}
    constants = {"ROWS": ADDED_ROWS, "BLOCK": ADDED_BLOCK}
    for kernel, size in product((add_rows_kernel, add_parts_kernel), ("", " odd D")):
        types = {name: kinds.get(name, "*fp32") for name in kernel.arg_names if name not in constants}
        found.append(
            Configuration(
                f"normalize/{kernel.__name__.removesuffix('_kernel').replace('_', ' ')}{size}",
                kernel,
                types,
                constants,
                num_warps=ADDED_WARPS,
                aligned=frozenset(types.keys() - {"rows", *(["size"] if size else [])}),
                streams=False,  # loads are wide; what is stored is the sum of many rows
            )
        )
    return found


def _configuration(kernel: Any, dtype: str, size: int, *, gathers: bool, has_dropout: bool) -> Configuration:
    constants = _constants(size, ROWS, gathers=gathers, has_dropout=has_dropout)
    kinds = {"ids_ptr": "*i64" if gathers else f"*{dtype}", "seed_ptr": "*i32" if has_dropout else f"*{dtype}"}
    kinds |= dict.fromkeys(("x_ptr", "grad_ptr", "result_ptr", "of_x_ptr"), f"*{dtype}")
    kinds |= dict.fromkeys(("keep_scale", "eps"), "fp32")
    types = {name: kinds.get(name, "i32") for name in kernel.arg_names if name not in constants}
    aligned = {name for name in types if name.endswith("_ptr") and name != "seed_ptr"}
    return Configuration(
        f"normalize/{kernel.__name__.removesuffix('_kernel')} {'embedding' if gathers else 'head'} {dtype} D={size}"
        + (" dropout" if has_dropout else ""),
        kernel,
        types,
        constants,
        num_warps=_num_warps(size),
        aligned=frozenset(aligned | ({"size"} if size % 16 == 0 else set())),
        streams=size >= 256 and size % 16 == 0,
    )
