"""What the attention kernels do with a tile of N queries and N keys of one row and head (Triton device functions).

Letters of shapes: N tile, d head size, P position vectors, T positions of a row, 2L distances, with L = T rounded up to
whole tiles. Tables by distance have row δ + L − 1 for the distance δ = i − j of query i and key j, −L < δ ≤ L.

A tile's rows are its queries and its columns its keys, or with KEYS the other way round: each of the two backward
kernels accumulates for the rows of its tiles.

Four tricks keep these kernels on chip; `README.md` has the counts:

- **Position scores by distance.** A tile meets 2N − 1 distances. C[r, δ] = row r · table[δ] are plain products, and the
  score of row r and column c is the entry at their distance: a gather along a diagonal, with indices that are the same
  for every tile.
- **8 × 8 after 8 × 8.** The products are stored in blocks of 8 × 8, as a tensor core's accumulator lays out its rows
  over threads, and gathered in that layout: two indices for each thread, the rest constants, no bank conflicts.
- **Zeros the compiler cannot see.** An index plus a number that is always 0, but computed from the loop's variable, is
  computed again in each iteration and at each use; otherwise it would stay in a register all the time.
- **One address a matrix.** A thread's rows of a tile differ by constants, so that one address serves them all; see
  `_pointers`.

The variant "load" does without gathers: position scores are loaded from products with all position vectors, and the
scores' gradients are laid out by distance in global memory.
"""

import math

import triton
import triton.language as tl

from kernels.backend import interpreted

LOG2_E = tl.constexpr(math.log2(math.e))  # scores are multiplied with it, since exp2 is one instruction
_COMPILED = tl.constexpr(not interpreted())  # the interpreter has no inline assembler


@triton.jit
def load_rows(
    pointer, first, stride: tl.constexpr, N: tl.constexpr, d: tl.constexpr, T: tl.constexpr, EVEN: tl.constexpr, zero=0
):
    """[N, d], rows first … first + N − 1 of a matrix with T rows; zeros beyond it. EVEN: tiles end where it does."""
    pointers = _pointers(pointer + first * stride, stride, zero, N, d)
    if EVEN:
        return tl.load(pointers)
    return tl.load(pointers, mask=first + tl.arange(0, N)[:, None] < T, other=0.0)


@triton.jit
def store_rows(pointer, first, stride: tl.constexpr, tile, T: tl.constexpr, EVEN: tl.constexpr):
    """The inverse of `load_rows`, in the matrix's dtype."""
    N: tl.constexpr = tile.shape[0]
    pointers = _pointers(pointer + first * stride, stride, 0, N, tile.shape[1])
    if EVEN:
        tl.store(pointers, tile)
    else:
        tl.store(pointers, tile, mask=first + tl.arange(0, N)[:, None] < T)


@triton.jit
def _pointers(pointer, stride: tl.constexpr, zero, N: tl.constexpr, d: tl.constexpr):
    """[N, d], to entries of rows `stride` apart, in groups of rows that 128 threads load at once, 16 bytes each.

    So a thread has one address, and its other groups differ from it by constants, which are part of the instructions:
    an address for each would take two registers.
    """
    G: tl.constexpr = min(N, 1024 // d)
    of_group = pointer + (tl.arange(0, G)[:, None] * stride + (tl.arange(0, d)[None, :] + zero))
    pointers = of_group[None, :, :] + tl.arange(0, N // G)[:, None, None] * (G * stride)
    return tl.max_contiguous(tl.multiple_of(tl.reshape(pointers, [N, d]), [1, 16]), [1, d])


@triton.jit
def load_positions(pointer, first, other: tl.constexpr, N: tl.constexpr, T: tl.constexpr, EVEN: tl.constexpr, zero=0):
    """[N], one number for each position."""
    positions = first + (tl.arange(0, N) + zero)
    if EVEN:
        return tl.load(pointer + positions)
    return tl.load(pointer + positions, mask=positions < T, other=other)


@triton.jit
def visible(document_ids_ptr, row, column, zero, is_causal, KEYS: tl.constexpr, N: tl.constexpr, T: tl.constexpr,
            EVEN: tl.constexpr):  # fmt: skip
    """Mask [N, N]: whether the query may see the key, for rows and columns that begin at these positions."""
    own = load_positions(document_ids_ptr, row, -1, N, T, EVEN, zero)
    own = tl.where(own < 0, -2, own)  # padding sees nothing, not even padding
    same = own[:, None] == load_positions(document_ids_ptr, column, -1, N, T, EVEN, zero)[None, :]
    rows = row + tl.arange(0, N)
    columns = (column + zero + tl.arange(0, N))[None, :]
    if KEYS:
        return same & (columns >= tl.where(is_causal, rows, 0)[:, None])
    return same & (columns <= tl.where(is_causal, rows, T)[:, None])


@triton.jit
def columns_in_reach(document_ids_ptr, row, is_causal, KEYS: tl.constexpr, N: tl.constexpr, T: tl.constexpr,
                     EVEN: tl.constexpr, SPAN: tl.constexpr):  # fmt: skip
    """First and one more than the last of the columns whose documents meet those of a tile's rows; SPAN ≥ T.

    Documents are consecutive, so all columns between belong to the rows' documents or to none that they see.
    """
    own = load_positions(document_ids_ptr, row, -1, N, T, EVEN)
    positions = tl.arange(0, SPAN)
    every = tl.load(document_ids_ptr + positions, mask=positions < T, other=-1)
    meets = (every >= tl.min(tl.where(own >= 0, own, 2147483647), 0)) & (every <= tl.max(own, 0)) & (every >= 0)
    if KEYS:
        meets = meets & ((positions >= row) | ~is_causal)
    else:
        meets = meets & ((positions < row + N) | ~is_causal)
    return tl.min(tl.where(meets, positions, SPAN), 0), tl.max(tl.where(meets, positions + 1, 0), 0)


@triton.jit
def of_row_and_head(table_ptr, b, h, B, T: tl.constexpr, H: tl.constexpr, d: tl.constexpr, P: tl.constexpr,
                    GATHERS: tl.constexpr):  # fmt: skip
    """Where position scores of queries and of keys are looked up, for one row and head; see `kernel.forward`."""
    if GATHERS:
        return table_ptr + (H * d + h * d), table_ptr + h * d
    of_queries_ptr = table_ptr + tl.cast(h * B + b, tl.int64) * (T * P)
    return of_queries_ptr, of_queries_ptr + tl.cast(B, tl.int64) * (H * T * P)


@triton.jit
def position_scores(rows, columns, of_queries_ptr, of_keys_ptr, buckets_ptr, query, key, zero, KEYS: tl.constexpr,
                    N: tl.constexpr, d: tl.constexpr, P: tl.constexpr, T: tl.constexpr, L: tl.constexpr,
                    STRIDE: tl.constexpr, EVEN: tl.constexpr, GATHERS: tl.constexpr):  # fmt: skip
    """Position scores [N, N] in fp32, unscaled.

    `rows` [N, d] are queries, or keys with KEYS, and `columns` [N, d] the others; `query` and `key` are the tile's
    first ones. The pointers are from `of_row_and_head`; rows of tables by distance are STRIDE apart.
    """
    if GATHERS:
        least = query - key + (L - N)  # the tables' row of the tile's least distance, of its first query and last key
        if KEYS:
            scores = _gathered_scores(rows, columns, of_keys_ptr, of_queries_ptr, least, zero, KEYS, N, d, STRIDE)
        else:
            scores = _gathered_scores(rows, columns, of_queries_ptr, of_keys_ptr, least, zero, KEYS, N, d, STRIDE)
    else:
        scores = _loaded_scores(of_queries_ptr, of_keys_ptr, buckets_ptr, query, key, zero, KEYS, N, P, T, L, EVEN)
    return scores


@triton.jit
def _gathered_scores(rows, columns, rows_table_ptr, columns_table_ptr, first, zero, KEYS: tl.constexpr,
                     N: tl.constexpr, d: tl.constexpr, STRIDE: tl.constexpr):  # fmt: skip
    """Each is the sum of two entries of products by distance, added in the inputs' dtype."""
    r1, r0, c1, c0 = _blocks(N)
    r0 += zero
    # distance, counted from the tile's least: queries − keys + N − 1; in blocks of 8 and the rest
    if KEYS:
        low, high = c0 - r0 + 7, c1 - r1 + (N // 8 - 1)
    else:
        low, high = r0 - c0 + 7, r1 - c1 + (N // 8 - 1)
    low = low // 8 * 64 + low % 8
    block_row: tl.constexpr = 16 * N  # of 8 rows and 2N distances
    at = tl.reshape((r1 * block_row + high * 64) + (low + r0 * 8), [N * N])
    of_rows = tl.gather(_by_distance(rows, rows_table_ptr, first, zero, N, d, STRIDE), at, 0)
    at = tl.reshape((c1 * block_row + high * 64) + (low + c0 * 8), [N * N])
    of_columns = tl.gather(_by_distance(columns, columns_table_ptr, first, zero, N, d, STRIDE), at, 0)
    return tl.reshape(of_rows + of_columns, [N, N]).to(tl.float32)


@triton.jit
def _loaded_scores(of_queries_ptr, of_keys_ptr, buckets_ptr, query, key, zero, KEYS: tl.constexpr, N: tl.constexpr,
                   P: tl.constexpr, T: tl.constexpr, L: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    """Without a gather: each is loaded by its bucket, from products with all position vectors, [T, P].

    In both loads neighbors along the tile's rows have one row of P entries, a line of the L1 cache.
    """
    of_queries = _loaded(of_queries_ptr, buckets_ptr + (query - key + (L - 1)), query, zero, 1, N, P, T, EVEN)
    of_keys = _loaded(of_keys_ptr, buckets_ptr + (query - key + (L - 1)), key, zero, -1, N, P, T, EVEN)
    if KEYS:
        return tl.trans(of_queries) + of_keys
    return of_queries + tl.trans(of_keys)


@triton.jit
def _loaded(pointer, buckets_ptr, first, zero, SIGN: tl.constexpr, N: tl.constexpr, P: tl.constexpr, T: tl.constexpr,
            EVEN: tl.constexpr):  # fmt: skip
    """[N, N] in fp32: of row r, the entry of the bucket at distance SIGN · (r − c) from `buckets_ptr`."""
    rows, columns = tl.arange(0, N)[:, None] + zero, tl.arange(0, N)[None, :]
    pointers = pointer + ((first + rows) * P + tl.load(buckets_ptr + (rows - columns) * SIGN))
    if EVEN:
        return tl.load(pointers).to(tl.float32)
    return tl.load(pointers, mask=first + rows < T, other=0.0).to(tl.float32)


@triton.jit
def _by_distance(x, table_ptr, first, zero, N: tl.constexpr, d: tl.constexpr, STRIDE: tl.constexpr):
    """X [N, d] times 2N rows of a table by distance, [N · 2N] in blocks; in halves, which hold fewer registers."""
    near = tl.dot(x, tl.trans(load_rows(table_ptr, first, STRIDE, N, d, 0, True, zero))).to(x.dtype)
    far = tl.dot(x, tl.trans(load_rows(table_ptr, first + N, STRIDE, N, d, 0, True, zero)))
    return _in_blocks(near, far.to(x.dtype), N)


@triton.jit
def _in_blocks(left, right, N: tl.constexpr):
    """[N, 2N], `left` beside `right`, flat: 8 × 8 after 8 × 8."""
    both = tl.reshape(tl.join(left, right), [N // 8, 8, N // 8, 8, 2])
    return tl.reshape(tl.permute(both, (0, 4, 2, 1, 3)), [2 * N * N])


@triton.jit
def _blocks(N: tl.constexpr):
    """Of each entry of [N, N]: row // 8, row % 8, column // 8, column % 8, along four dimensions."""
    high, low = tl.arange(0, N // 8), tl.arange(0, 8)
    return high[:, None, None, None], low[None, :, None, None], high[None, None, :, None], low[None, None, None, :]


@triton.jit
def add_by_bucket(sums, grad_scores, scratch_ptr, bucket_rows_ptr, middle, zero, KEYS: tl.constexpr, N: tl.constexpr,
                  P: tl.constexpr, GATHERS: tl.constexpr):  # fmt: skip
    """Sums [N, P] + Σ over columns c of grad_scores[r, c]·[β = p]: the backward of a row's lookup.

    Laid out by distance, the sum is a product with the 0-1 rows of `bucket_rows` [2L, P]. `middle` is the row of the
    distance 0 within the tile (its first query and key).
    """
    if GATHERS:
        sums = _add_gathered(sums, grad_scores, bucket_rows_ptr, middle, zero, KEYS, N, P)
    else:
        sums = _add_through_memory(sums, grad_scores, scratch_ptr, bucket_rows_ptr, middle, zero, KEYS, N, P)
    return sums


@triton.jit
def _add_gathered(
    sums, grad_scores, bucket_rows_ptr, middle, zero, KEYS: tl.constexpr, N: tl.constexpr, P: tl.constexpr
):
    """A gather beyond the tile meets zeros put beside it."""
    r1, r0, c1, c0 = _blocks(N)
    r0 += zero
    zeros = tl.zeros_like(grad_scores)
    for turn in tl.static_range(2):  # distances 0 … N − 1, then −N … −1
        if (turn == 1) == KEYS:  # a row reads columns r + δ − N … or r + δ …, and zeros on the other side
            pair = _in_blocks(zeros, grad_scores, N)
        else:
            pair = _in_blocks(grad_scores, zeros, N)
        if KEYS:
            low, high = r0 + c0, r1 + c1
        else:
            low, high = r0 - c0 + 8, r1 - c1 - 1 + N // 8
        low = low // 8 * 64 + low % 8
        at = tl.reshape((r1 * (16 * N) + high * 64) + (low + r0 * 8), [N * N])
        by_distance = _laid_out_as(tl.reshape(tl.gather(pair, at, 0), [N, N]), grad_scores)
        buckets = load_rows(bucket_rows_ptr, middle - turn * N, P, N, P, 0, True, zero)
        sums = tl.dot(by_distance, buckets, sums)
    return sums


@triton.jit
def _add_through_memory(
    sums, grad_scores, scratch_ptr, bucket_rows_ptr, middle, zero, KEYS: tl.constexpr, N: tl.constexpr, P: tl.constexpr
):
    """Without a gather: the tile is stored by distance, and loaded again.

    Every tile writes the same entries of the program's scratch [N, 2N], of distances −N … N − 1; the others stay zeros.
    """
    rows, columns = tl.arange(0, N)[:, None] + zero, tl.arange(0, N)[None, :]
    if KEYS:
        by_distance = rows * (2 * N - 1) + columns + N
    else:
        by_distance = rows * (2 * N + 1) - columns + N
    tl.debug_barrier()  # the tile before this one has been read
    tl.store(scratch_ptr + by_distance, grad_scores)
    tl.debug_barrier()
    for half in tl.static_range(2):
        near = load_rows(scratch_ptr + half * N, 0, 2 * N, N, N, N, True, zero)
        sums = tl.dot(near, load_rows(bucket_rows_ptr, middle + (half - 1) * N, P, N, P, 0, True, zero), sums)
    return sums


@triton.jit
def _laid_out_as(x, like):
    """x; the compiler is made to lay it out over threads as `like`, which costs no instruction."""
    if _COMPILED:
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,r", [x, like], dtype=x.dtype, is_pure=True, pack=2)
    return x
