"""Attention in one pass over tiles of scores, which stay on chip: the forward kernel, and the launches of all three.

Letters of shapes: B rows, T positions, H heads, d head size, D = H·d, P position vectors, N tile, 2L distances, where L
is T rounded up to whole tiles.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.assembler import use_right_assembler
from kernels.attention_context import backward_kernel
from kernels.attention_context.fused import TILE, tile_size
from kernels.attention_context.tiles import (
    LOG2_E,
    columns_in_reach,
    load_rows,
    of_row_and_head,
    position_scores,
    store_rows,
    visible,
)
from kernels.configuration import Configuration, launch_warps
from kernels.dropout_hash import first_words, keep_arguments, outer_keep_mask
from kernels.wanted import VARIANTS

NUM_WARPS, NUM_STAGES = 4, 1
PROGRAMS = 264  # of each backward kernel, over all heads; a constant, since it fixes the order of additions
# Bytes a thread, for heads of 32 and 64. Heads of 128 and sm_80, where operands of products are in registers too, have
# no bar.
_MOST_SPILLED = {
    "forward_kernel": {"sm_90": 0, "sm_100": 0},
    "queries_kernel": {"sm_90": 48, "sm_100": 104},
    "keys_kernel": {"sm_90": 48, "sm_100": 104},
}
# What was reached for heads of 64 with dropout, by length: instructions of a warp and accesses of shared memory, for a
# tile. See `kernels.machine_code`.
_MOST_COUNTED = {
    "gather": {
        "forward_kernel": {128: (1_680, 1_070), 512: (1_520, 1_000)},
        "queries_kernel": {128: (2_030, 2_120), 512: (1_870, 1_770)},
        "keys_kernel": {128: (2_300, 2_160), 512: (2_060, 1_760)},
    },
    "load": {
        "forward_kernel": {128: (1_910, 1_140), 512: (1_780, 1_070)},
        "queries_kernel": {128: (2_340, 1_930), 512: (2_360, 1_580)},
        "keys_kernel": {128: (2_640, 1_840), 512: (2_390, 1_440)},
    },
}
# what the check launches if it is of no particular run: heads, head size, length, position vectors, dropout or not
CHECKED = (
    (1, 32, 16, 32, False),
    (2, 64, 64, 64, True),
    (2, 32, 50, 16, False),
    (1, 64, 100, 64, True),
    (1, 32, 150, 64, True),
    (1, 128, 70, 32, False),
)


@triton.jit(do_not_specialize=["threshold", "B"])
def forward_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    table_ptr,
    buckets_ptr,
    document_ids_ptr,
    is_causal_ptr,
    seed_ptr,
    output_ptr,
    lse_ptr,
    scale: tl.float32,
    keep_scale: tl.float32,
    threshold: tl.int32,
    B: tl.int32,
    T: tl.constexpr,
    H: tl.constexpr,
    d: tl.constexpr,
    QUERY_STRIDE: tl.constexpr,
    KEY_STRIDE: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    L: tl.constexpr,
    N: tl.constexpr,
    SPAN: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    P: tl.constexpr,
    GATHERS: tl.constexpr,
):
    """One program per tile of N queries, row and head; grid [L / N, B, H].

    Writes output [B, T, D] and lse [H, B, T], the base-2 logarithm of Σ exp(score), for the backward; 0 where a query
    sees no key, whose output is zeros.
    """
    D: tl.constexpr = H * d
    EVEN: tl.constexpr = T == L
    SKIPS: tl.constexpr = L > 2 * N  # in short rows looking for documents takes longer than their tiles
    first = tl.program_id(0) * N
    b, h = tl.program_id(1), tl.program_id(2)
    row = tl.cast(b, tl.int64) * T
    document_ids_ptr += row
    query_ptr += row * QUERY_STRIDE + h * d
    key_ptr += row * KEY_STRIDE + h * d
    value_ptr += row * VALUE_STRIDE + h * d
    is_causal = tl.load(is_causal_ptr + b) != 0
    positions = first + tl.arange(0, N)
    row_of_lse = (h * B + b) * T
    of_queries, of_keys = of_row_and_head(table_ptr, b, h, B, T, H, d, P, GATHERS)

    # 1. The tile's queries [N, d]; running maximum, sum and output of each query, as in FlashAttention-2 (Dao 2023).
    query = load_rows(query_ptr, first, QUERY_STRIDE, N, d, T, EVEN)
    largest = tl.full([N], float("-inf"), tl.float32)
    total = tl.zeros([N], tl.float32)
    output = tl.zeros([N, d], tl.float32)
    # 2. The keys that the tile can see.
    start, end = 0, tl.where(is_causal, first + N, L)
    if SKIPS:
        start, end = columns_in_reach(document_ids_ptr, first, is_causal, False, N, T, EVEN, SPAN)
        start = start // N * N
    for column in range(start, end, N):
        zero = tl.multiple_of(column >> 30, N)
        # 3. Scores [N, N], in units of ln 2: content and position scores, −∞ where not visible.
        key = load_rows(key_ptr, column, KEY_STRIDE, N, d, T, EVEN)
        scores = position_scores(
            query, key, of_queries, of_keys, buckets_ptr, first, column, zero, False, N, d, P, T, L, 2 * D, EVEN,
            GATHERS,
        )  # fmt: skip
        scores = tl.dot(query, tl.trans(key), scores)
        seen = visible(document_ids_ptr, first, column, zero, is_causal, False, N, T, EVEN)
        scores = tl.where(seen, scores * (scale * LOG2_E), float("-inf"))
        # 4. Rescale what there is to the new maximum; add the tile.
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        shift = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        weights = tl.exp2(scores - shift[:, None])
        rescale = tl.exp2(largest - shift)
        total = total * rescale + tl.sum(weights, 1)
        if HAS_DROPOUT:
            words = first_words((row_of_lse + positions) * T, seed_ptr)
            kept = outer_keep_mask(words, column + zero + tl.arange(0, N), seed_ptr, threshold)
            weights = tl.where(kept, weights, 0.0)
        value = load_rows(value_ptr, column, VALUE_STRIDE, N, d, T, EVEN)
        output = tl.dot(weights.to(value.dtype), value, output * rescale[:, None])
        largest = new_largest
    # 5. Normalize; a query that has seen no key gets zeros.
    sees_any = total > 0
    total = tl.where(sees_any, total, 1.0)
    output *= (keep_scale / total)[:, None]
    store_rows(output_ptr + row * D + h * d, first, D, output, T, EVEN)
    lse = tl.where(sees_any, largest, 0.0) + tl.log2(total)
    if EVEN:
        tl.store(lse_ptr + row_of_lse + positions, lse)
    else:
        tl.store(lse_ptr + row_of_lse + positions, lse, mask=positions < T)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    buckets: Tensor,
    variant: str,
    document_ids: Tensor,
    is_causal: Tensor,
    seed: Tensor | None,
    dropout_prob: float,
    scale: float,
    num_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch `forward_kernel`.

    Args:
        query: [B, T, D]; rows may stand apart, as halves of a projection do.
        key: [B, T, D].
        value: [B, T, D].
        position: [P, 2D]: position queries and keys side by side.
        buckets: [2L], of `DistanceTables`.
        variant: the same.
        document_ids: [B, T] integers.
        is_causal: [B] bool.
        seed: [2] int32, or None.
        dropout_prob: probability of a zero.
        scale: factor of the scores.
        num_heads: H.

    Returns:
        Output [B, T, D]; base-2 log-sum-exp of the scores [H, B, T] in fp32; where the kernels look position scores up.
        The last is, for "gather", `position` by distance [2L, 2D], and for "load" the products of queries with position
        keys and of keys with position queries [2, H, B · T, P].
    """
    num_rows, length, hidden_size = query.shape
    output = torch.empty(num_rows, length, hidden_size, dtype=query.dtype, device=query.device)
    lse = torch.empty(num_heads, num_rows, length, dtype=torch.float32, device=query.device)
    if variant == "gather":
        table = position.index_select(0, buckets)
    else:
        table = _position_products(query, key, position, num_heads)
    settings = _settings(query, key, value, seed, num_heads, len(position), variant)
    if num_rows:
        use_right_assembler()
        with torch.cuda.device_of(query):
            forward_kernel[(settings["L"] // settings["N"], num_rows, num_heads)](
                query, key, value, table, buckets, document_ids, is_causal,
                is_causal if seed is None else seed, output, lse,
                *_numbers(seed, dropout_prob, scale), num_rows, **settings,
            )  # fmt: skip
    return output, lse, table


def _position_products(query: Tensor, key: Tensor, position: Tensor, num_heads: int) -> Tensor:
    """Queries · position keys and keys · position queries, [2, H, B · T, P]: two products, of all rows and heads."""
    position_query, position_key = position.unflatten(1, (2, num_heads, -1)).permute(1, 2, 3, 0)  # [H, d, P]
    query, key = (x.flatten(0, 1).unflatten(1, (num_heads, -1)).movedim(1, 0) for x in (query, key))  # [H, B · T, d]
    products = query.new_empty(2, *query.shape[:2], len(position))
    torch.bmm(query, position_key, out=products[0])
    torch.bmm(key, position_query, out=products[1])
    return products


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor,
    buckets: Tensor,
    bucket_rows: Tensor,
    variant: str,
    document_ids: Tensor,
    is_causal: Tensor,
    seed: Tensor | None,
    output: Tensor,
    lse: Tensor,
    table: Tensor,
    dropout_prob: float,
    scale: float,
    num_heads: int,
    gradients: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    """Launch the kernels of `backward_kernel`.

    Args: as `forward`, and
        grad: [B, T, D], contiguous, of the output.
        position: contiguous.
        bucket_rows: [2L, P], of `DistanceTables`.
        output: of the forward, as the next two.
        lse: [H, B, T].
        table: where position scores are looked up.
        gradients: of query, key and value, with their shapes, strides and dtype, to be written.

    Returns:
        The gradient of `position`, [P, 2D] in fp32.
    """
    num_rows, _, hidden_size = query.shape
    num_buckets = len(position)
    settings = _settings(query, key, value, seed, num_heads, num_buckets, variant)
    tile = settings["N"]
    groups = max(1, min(PROGRAMS // num_heads, num_rows * (settings["L"] // tile)))
    of_query, of_key, of_value = gradients
    parts = torch.zeros(groups, num_buckets, 2 * hidden_size, dtype=torch.float32, device=grad.device)
    scratch = (grad, grad) if variant == "gather" else grad.new_zeros(2, groups, num_heads, tile, 2 * tile)
    delta = torch.empty_like(lse)
    rows = (document_ids, is_causal, is_causal if seed is None else seed)
    numbers = (*_numbers(seed, dropout_prob, scale), num_rows)
    if num_rows:
        use_right_assembler()
        with torch.cuda.device_of(query):
            backward_kernel.queries_kernel[(groups, num_heads)](
                query, key, value, table, buckets, bucket_rows, position, *rows, output, lse, grad,
                delta, of_query, parts, scratch[0], *numbers, **settings,
            )  # fmt: skip
            backward_kernel.keys_kernel[(groups, num_heads)](
                query, key, value, table, buckets, bucket_rows, position, *rows, lse, grad,
                delta, of_key, of_value, parts, scratch[1], *numbers, **settings,
            )  # fmt: skip
    return parts.sum(dim=0)


def _numbers(seed: Tensor | None, dropout_prob: float, scale: float) -> tuple[float, float, int]:
    threshold, keep_scale = keep_arguments(seed, dropout_prob)
    return scale, keep_scale, threshold


def _settings(
    query: Tensor, key: Tensor, value: Tensor, seed: Tensor | None, num_heads: int, num_vectors: int, variant: str
) -> dict[str, int]:
    """Keyword arguments of a launch."""
    length, hidden_size = query.shape[1:]
    strides = (query.stride(1), key.stride(1), value.stride(1))
    sizes = (num_heads, hidden_size // num_heads, length, num_vectors)
    constants = _constants(*sizes, strides, variant, has_dropout=seed is not None)
    return {**constants, "num_warps": launch_warps(NUM_WARPS), "num_stages": NUM_STAGES}


def _constants(
    num_heads: int,
    head_size: int,
    length: int,
    num_vectors: int,
    strides: tuple[int, int, int],
    variant: str,
    *,
    has_dropout: bool,
) -> dict[str, int]:
    """Constants of all three kernels."""
    tile = tile_size(length)
    return {
        "T": length,
        "H": num_heads,
        "d": head_size,
        **dict(zip(("QUERY_STRIDE", "KEY_STRIDE", "VALUE_STRIDE"), strides, strict=True)),
        "L": triton.cdiv(length, tile) * tile,
        "N": min(tile, 4096 // head_size),  # a larger tile of heads of 128 takes too many registers
        "SPAN": triton.next_power_of_2(length),
        "HAS_DROPOUT": has_dropout,
        "P": num_vectors,
        "GATHERS": variant == "gather",
    }


def configurations() -> list[Configuration]:
    """Variants of all three kernels: published shapes and those of the check; each model and row length has its own."""
    cases = [
        (12, 64, 128, 64, True),
        (12, 64, 512, 64, True),
        (6, 64, 128, 64, False),
        (8, 32, 128, 64, True),
        (8, 128, 256, 64, True),
        *CHECKED,
    ]
    kernels = (forward_kernel, backward_kernel.queries_kernel, backward_kernel.keys_kernel)
    return [
        _configuration(kernel, num_heads, head_size, length, num_vectors, variant, has_dropout=has_dropout)
        for variant in VARIANTS["attention_context"]
        for num_heads, head_size, length, num_vectors, has_dropout in cases
        for kernel in kernels
    ]


def _configuration(
    kernel: Any, num_heads: int, head_size: int, length: int, num_vectors: int, variant: str, *, has_dropout: bool
) -> Configuration:
    strides = (4 * num_heads * head_size,) * 3  # of quarters of a projection
    constants = _constants(num_heads, head_size, length, num_vectors, strides, variant, has_dropout=has_dropout)
    kinds = {
        "buckets_ptr": "*i64" if variant == "gather" else "*i32",
        "document_ids_ptr": "*i32",
        "is_causal_ptr": "*u1",
        "seed_ptr": "*i32" if has_dropout else "*u1",
    }
    kinds |= dict.fromkeys(("lse_ptr", "delta_ptr", "of_position_ptr"), "*fp32")
    kinds |= {"scale": "fp32", "keep_scale": "fp32", "threshold": "i32", "B": "i32"}
    types = {name: kinds.get(name, "*bf16") for name in kernel.arg_names if name not in constants}
    counted = _MOST_COUNTED[variant][kernel.__name__] if head_size == 64 and has_dropout else {}
    most_instructions, most_wavefronts = counted.get(length, (math.inf, math.inf))
    return Configuration(
        f"attention_context/{kernel.__name__.removesuffix('_kernel')} d={head_size} T={length}"
        + ("" if variant == "gather" else f" {variant}")
        + (" dropout" if has_dropout else ""),
        kernel,
        types,
        constants,
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
        aligned=frozenset(name for name in types if name.endswith("_ptr")),
        streams=tile_size(length) == TILE,
        has_products=True,
        targets=frozenset({"sm_80", "sm_89", "sm_90", "sm_100", "sm_120"}),  # see `is_fused`
        most_spilled={"any": math.inf} | (_MOST_SPILLED[kernel.__name__] if head_size <= 64 else {}),
        most_instructions=most_instructions,
        most_wavefronts=most_wavefronts,
    )
