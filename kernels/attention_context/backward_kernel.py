"""The backward of attention: two kernels, one for tiles of queries and one for tiles of keys; letters as in kernel.py.

With weights w = exp(score − lse) and dropout's mask m / (1 − p), the gradient of a score is w · (m · (grad · value) −
δ), with δ = Σ grad · output of its query (Dao 2023, section 3.2). Scores are computed again. Sums by bucket, of one
program each, are added in a fixed order: no atomics.

Nothing is moved out of the loops (`disable_licm`): what the compiler would compute once, addresses and descriptors of
shared memory, would have to be spilled, since registers are full inside.
"""

import triton
import triton.language as tl

from kernels.attention_context.tiles import (
    LOG2_E,
    add_by_bucket,
    columns_in_reach,
    load_positions,
    load_rows,
    of_row_and_head,
    position_scores,
    store_rows,
    visible,
)
from kernels.dropout_hash import first_words, outer_keep_mask


@triton.jit(do_not_specialize=["threshold", "B"])
def queries_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    table_ptr,
    buckets_ptr,
    bucket_rows_ptr,
    position_ptr,
    document_ids_ptr,
    is_causal_ptr,
    seed_ptr,
    output_ptr,
    lse_ptr,
    grad_ptr,
    delta_ptr,
    of_query_ptr,
    of_position_ptr,
    scratch_ptr,
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
    """Gradients of the queries and of `position_key`, and δ [H, B, T]; grid [groups, H].

    Program (g, h) takes the tiles g, g + groups, … of all rows, and adds its part of position_key's gradient to
    of_position [groups, P, 2D], which starts as zeros; the other half is position_query's.
    """
    D: tl.constexpr = H * d
    EVEN: tl.constexpr = T == L
    SKIPS: tl.constexpr = L > 2 * N
    TILES: tl.constexpr = L // N
    group, groups, h = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    scratch = scratch_ptr + (group * H + h) * (2 * N * N)
    for item in tl.range(group, B * TILES, groups, disable_licm=True):
        b, first = item // TILES, item % TILES * N
        head = h * d
        row = tl.cast(b, tl.int64) * T
        documents = document_ids_ptr + row
        is_causal = tl.load(is_causal_ptr + b) != 0
        row_of_lse = (h * B + b) * T
        positions = first + tl.arange(0, N)
        of_queries, of_keys = of_row_and_head(table_ptr, b, h, B, T, H, d, P, GATHERS)
        # 1. The tile's queries and gradients [N, d], and δ [N].
        query = load_rows(query_ptr + row * QUERY_STRIDE + head, first, QUERY_STRIDE, N, d, T, EVEN)
        grad = load_rows(grad_ptr + row * D + head, first, D, N, d, T, EVEN)
        output = load_rows(output_ptr + row * D + head, first, D, N, d, T, EVEN)
        delta = tl.sum(grad.to(tl.float32) * output.to(tl.float32), 1)
        if EVEN:
            tl.store(delta_ptr + row_of_lse + positions, delta)
        else:
            tl.store(delta_ptr + row_of_lse + positions, delta, mask=positions < T)
        of_query = tl.zeros([N, d], tl.float32)
        sums = tl.zeros([N, P], tl.float32)
        if SKIPS:
            start, end = columns_in_reach(documents, first, is_causal, False, N, T, EVEN, SPAN)
        for column in tl.range(0, tl.where(is_causal, first + N, L), N, disable_licm=True):
            # 2. For each tile of keys: ∂query, and ∂C by bucket. (The bounds of the loop are the same for all threads,
            #    which spares registers; a tile out of reach is left out inside it.)
            if SKIPS:
                is_in_reach = (column + N > start) & (column < end)
            else:
                is_in_reach: tl.constexpr = True
            if is_in_reach:
                of_query, sums = _add_keys(
                    of_query, sums, query, grad, delta, key_ptr + row * KEY_STRIDE + head,
                    value_ptr + row * VALUE_STRIDE + head, of_queries, of_keys, buckets_ptr, bucket_rows_ptr, scratch,
                    documents, lse_ptr + row_of_lse, seed_ptr, row_of_lse, first, column, is_causal, scale,
                    keep_scale, threshold, T, D, d, KEY_STRIDE, VALUE_STRIDE, L, N, P, EVEN, HAS_DROPOUT, GATHERS,
                )  # fmt: skip
        # 3. The position vectors' share of ∂query; ∂position_key [P, d] of the tile.
        narrow = sums.to(query.dtype)
        position_key = load_rows(position_ptr + (D + head), 0, 2 * D, P, d, P, True)
        of_query = tl.dot(narrow, position_key, of_query) * scale
        store_rows(of_query_ptr + row * QUERY_STRIDE + head, first, QUERY_STRIDE, of_query, T, EVEN)
        of_position_key = tl.dot(tl.trans(narrow), query) * scale
        part = group * (2 * P * D) + head
        _add_part(of_position_ptr + (part + D), of_position_key, 2 * D, P, d)


@triton.jit
def _add_keys(
    of_query, sums, query, grad, delta, key_ptr, value_ptr, of_queries, of_keys, buckets_ptr, bucket_rows_ptr,
    scratch_ptr, document_ids_ptr, lse_ptr, seed_ptr, row_of_lse, first, column, is_causal, scale, keep_scale,
    threshold, T: tl.constexpr, D: tl.constexpr, d: tl.constexpr, KEY_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr,
    L: tl.constexpr, N: tl.constexpr, P: tl.constexpr, EVEN: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    GATHERS: tl.constexpr,
):  # fmt: skip
    """∂query [N, d] and ∂C by bucket [N, P], unscaled, with one tile of keys added."""
    zero = tl.multiple_of(column >> 30, N)
    # a. The weights [N, N], queries × keys.
    key = load_rows(key_ptr, column, KEY_STRIDE, N, d, T, EVEN, zero)
    scores = position_scores(
        query, key, of_queries, of_keys, buckets_ptr, first, column, zero, False, N, d, P, T, L, 2 * D, EVEN, GATHERS
    )
    scores = tl.dot(query, tl.trans(key), scores)
    lse = load_positions(lse_ptr, first, 0.0, N, T, EVEN, zero)
    seen = visible(document_ids_ptr, first, column, zero, is_causal, False, N, T, EVEN)
    weights = tl.where(seen, tl.exp2(scores * (scale * LOG2_E) - lse[:, None]), 0.0)
    # b. Gradients of weights and scores.
    value = load_rows(value_ptr, column, VALUE_STRIDE, N, d, T, EVEN, zero)
    of_weights = tl.dot(grad, tl.trans(value))
    if HAS_DROPOUT:
        words = first_words((row_of_lse + first + tl.arange(0, N)) * T, seed_ptr)
        kept = outer_keep_mask(words, column + zero + tl.arange(0, N), seed_ptr, threshold)
        of_weights = tl.where(kept, of_weights * keep_scale, 0.0)
    of_scores = (weights * (of_weights - delta[:, None])).to(query.dtype)
    # c. Their products with the keys, and their sums by bucket.
    of_query = tl.dot(of_scores, key, of_query)
    middle = first - column + L
    sums = add_by_bucket(sums, of_scores, scratch_ptr, bucket_rows_ptr, middle, zero, False, N, P, GATHERS)
    return of_query, sums


@triton.jit(do_not_specialize=["threshold", "B"])
def keys_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    table_ptr,
    buckets_ptr,
    bucket_rows_ptr,
    position_ptr,
    document_ids_ptr,
    is_causal_ptr,
    seed_ptr,
    lse_ptr,
    grad_ptr,
    delta_ptr,
    of_key_ptr,
    of_value_ptr,
    of_position_ptr,
    scratch_ptr,
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
    """Gradients of keys, values and of `position_query`; grid and parts as in `queries_kernel`, which runs before."""
    D: tl.constexpr = H * d
    EVEN: tl.constexpr = T == L
    SKIPS: tl.constexpr = L > 2 * N
    TILES: tl.constexpr = L // N
    group, groups, h = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    scratch = scratch_ptr + (group * H + h) * (2 * N * N)
    for item in tl.range(group, B * TILES, groups, disable_licm=True):
        b, first = item // TILES, item % TILES * N
        head = h * d
        row = tl.cast(b, tl.int64) * T
        documents = document_ids_ptr + row
        is_causal = tl.load(is_causal_ptr + b) != 0
        row_of_lse = (h * B + b) * T
        of_queries, of_keys = of_row_and_head(table_ptr, b, h, B, T, H, d, P, GATHERS)
        # 1. The tile's keys and values [N, d].
        key = load_rows(key_ptr + row * KEY_STRIDE + head, first, KEY_STRIDE, N, d, T, EVEN)
        value = load_rows(value_ptr + row * VALUE_STRIDE + head, first, VALUE_STRIDE, N, d, T, EVEN)
        of_key = tl.zeros([N, d], tl.float32)
        of_value = tl.zeros([N, d], tl.float32)
        sums = tl.zeros([N, P], tl.float32)
        if SKIPS:
            start, end = columns_in_reach(documents, first, is_causal, True, N, T, EVEN, SPAN)
        for column in tl.range(tl.where(is_causal, first, 0), L, N, disable_licm=True):
            # 2. For each tile of queries: ∂key, ∂value, and ∂R by bucket.
            if SKIPS:
                is_in_reach = (column + N > start) & (column < end)
            else:
                is_in_reach: tl.constexpr = True
            if is_in_reach:
                of_key, of_value, sums = _add_queries(
                    of_key, of_value, sums, key, value, query_ptr + row * QUERY_STRIDE + head,
                    grad_ptr + row * D + head, of_queries, of_keys, buckets_ptr, bucket_rows_ptr, scratch, documents,
                    lse_ptr + row_of_lse, delta_ptr + row_of_lse, seed_ptr, row_of_lse, first, column, is_causal,
                    scale, keep_scale, threshold, T, D, d, QUERY_STRIDE, L, N, P, EVEN, HAS_DROPOUT, GATHERS,
                )  # fmt: skip
        # 3. The position vectors' share of ∂key; ∂position_query [P, d] of the tile.
        store_rows(of_value_ptr + row * VALUE_STRIDE + head, first, VALUE_STRIDE, of_value * keep_scale, T, EVEN)
        narrow = sums.to(key.dtype)
        position_query = load_rows(position_ptr + head, 0, 2 * D, P, d, P, True)
        of_key = tl.dot(narrow, position_query, of_key) * scale
        store_rows(of_key_ptr + row * KEY_STRIDE + head, first, KEY_STRIDE, of_key, T, EVEN)
        of_position_query = tl.dot(tl.trans(narrow), key) * scale
        part = group * (2 * P * D) + head
        _add_part(of_position_ptr + part, of_position_query, 2 * D, P, d)


@triton.jit
def _add_queries(
    of_key, of_value, sums, key, value, query_ptr, grad_ptr, of_queries, of_keys, buckets_ptr, bucket_rows_ptr,
    scratch_ptr, document_ids_ptr, lse_ptr, delta_ptr, seed_ptr, row_of_lse, first, column, is_causal, scale,
    keep_scale, threshold, T: tl.constexpr, D: tl.constexpr, d: tl.constexpr, QUERY_STRIDE: tl.constexpr,
    L: tl.constexpr, N: tl.constexpr, P: tl.constexpr, EVEN: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    GATHERS: tl.constexpr,
):  # fmt: skip
    """∂key and ∂value [N, d] and ∂R by bucket [N, P], unscaled, with one tile of queries added."""
    zero = tl.multiple_of(column >> 30, N)
    # a. The weights [N, N], keys × queries.
    query = load_rows(query_ptr, column, QUERY_STRIDE, N, d, T, EVEN, zero)
    scores = position_scores(
        key, query, of_queries, of_keys, buckets_ptr, column, first, zero, True, N, d, P, T, L, 2 * D, EVEN, GATHERS
    )
    scores = tl.dot(key, tl.trans(query), scores)
    lse = load_positions(lse_ptr, column, 0.0, N, T, EVEN, zero)
    seen = visible(document_ids_ptr, first, column, zero, is_causal, True, N, T, EVEN)
    weights = tl.where(seen, tl.exp2(scores * (scale * LOG2_E) - lse[None, :]), 0.0)
    if HAS_DROPOUT:
        # the element's index is (row_of_lse + query) · T + key: here keys vary along rows
        words = first_words((row_of_lse + column) * T + first + zero + tl.arange(0, N), seed_ptr)
        kept = outer_keep_mask(words, tl.arange(0, N) * T, seed_ptr, threshold)
        weights = tl.where(kept, weights, -weights)  # a dropped weight is a negative one: no registers for the mask
    # b. ∂value; gradients of weights and scores.
    grad = load_rows(grad_ptr, column, D, N, d, T, EVEN, zero)
    of_value = tl.dot(tl.maximum(weights, 0.0).to(grad.dtype), grad, of_value)
    of_weights = tl.dot(value, tl.trans(grad))
    delta = load_positions(delta_ptr, column, 0.0, N, T, EVEN, zero)
    if HAS_DROPOUT:
        of_weights = tl.where(weights > 0.0, of_weights * keep_scale, 0.0)
        weights = tl.abs(weights)
    of_scores = (weights * (of_weights - delta[None, :])).to(key.dtype)
    # c. Their products with the queries, and their sums by bucket.
    of_key = tl.dot(of_scores, query, of_key)
    middle = column - first + L
    sums = add_by_bucket(sums, of_scores, scratch_ptr, bucket_rows_ptr, middle, zero, True, N, P, GATHERS)
    return of_key, of_value, sums


@triton.jit
def _add_part(pointer, x, STRIDE: tl.constexpr, P: tl.constexpr, d: tl.constexpr):
    """Add x [P, d] to a program's own part of a sum."""
    pointers = pointer + (tl.arange(0, P)[:, None] * STRIDE + tl.arange(0, d)[None, :])
    tl.debug_barrier()  # another thread may have stored what this one loads
    tl.store(pointers, tl.load(pointers) + x)
