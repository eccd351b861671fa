"""Span masking of a batch in one launch: one program per row, which it keeps in registers, reads once and writes once.

Lane i of a block holds position i. No gather: a scan along the row finds the start of each position's span, and the
random numbers of the start are drawn again from its position.
"""

from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.configuration import Configuration, fitting_warps
from kernels.padding import PADDING, padded_length, padded_rows
from kernels.span_mask import reference

MAX_LENGTH = 4096  # of a row
MAX_SPAN_LENGTH = 16  # 2⁴ states of 4 bits fill 64 bits; for spans up to 4, 2² states of 2 bits take 8
_MIN_BLOCK = 256  # one warp of 32 threads with _ENTRIES_PER_THREAD each
_ENTRIES_PER_THREAD = 8  # two words of 128 bits of int32; on AMD one
_TOKEN_TYPES = {torch.int32: "i32", torch.int64: "i64"}  # narrower ones would mean narrow words and more variants
_SCALARS = (
    "mask_p",
    "random_limit",
    "keep_limit",
    "mask_token_id",
    "vocab_size",
    "num_special_tokens",
    "max_span_length",
    "seed",
)

_IGNORE_INDEX = tl.constexpr(reference.IGNORE_INDEX)
_COUNT_WEIGHTS = tl.constexpr(reference.COUNT_WEIGHTS)
_MAX_COUNT = tl.constexpr(len(reference.COUNT_WEIGHTS) - 1)


@triton.jit
def _philox(seed, position, stream, row_id):
    """Philox4x32-10 as in the reference: four uint32 words [BLOCK], one of each per position.

    `tl.philox` computes the same, but its unrolled rounds keep every round's key in a register between calls.
    """
    # 1. Counter (position, stream, row id low, row id high), key = seed.
    word0 = position.to(tl.uint32)
    zeros = word0 & 0
    word1, word2, word3 = zeros + stream, zeros + row_id.to(tl.uint32), zeros + (row_id >> 32).to(tl.uint32)
    key0, key1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    # 2. Ten rounds: two 32 × 32 → 64-bit products, then the Weyl sequence of the keys.
    for _ in range(10):
        high0, low0 = tl.umulhi(word0, 0xD2511F53), tl.mul(word0, 0xD2511F53, sanitize_overflow=False)
        high1, low1 = tl.umulhi(word2, 0xCD9E8D57), tl.mul(word2, 0xCD9E8D57, sanitize_overflow=False)
        word0, word1, word2, word3 = high1 ^ word1 ^ key0, low1, high0 ^ word3 ^ key1, low0
        key0 = tl.add(key0, 0x9E3779B9, sanitize_overflow=False)
        key1 = tl.add(key1, 0xBB67AE85, sanitize_overflow=False)
    return word0, word1, word2, word3


@triton.jit
def _compose(first, second):
    """The function `second` after `first`, each packed into an integer: its values, state 0 in the lowest bits."""
    bits: tl.constexpr = 2 if first.dtype == tl.uint32 else 4
    composed = first & 0
    for state in tl.static_range(2**bits):
        value = (first >> (bits * state)) & (2**bits - 1)
        value = (second >> (bits * value)) & (2**bits - 1)
        composed |= value << (bits * state)
    return composed


@triton.jit
def _latest(first, first_but_last, second, second_but_last):  # noqa: ARG001 - a scan passes it
    """Scan operator: the maximum of a segment, and that of all but its last position (lanes cannot read neighbors)."""
    return tl.maximum(first, second), tl.maximum(first, second_but_last)


@triton.jit
def _span_starts(position, following, BITS: tl.constexpr):
    """[BLOCK] int32, the start of each position's span; spans tile the row from the left.

    A span that starts at a position has `following` tokens after it, fewer than 2^BITS. As in the reference, a position
    is a function from "tokens left in the current span" to its value one position later; a scan composes them.
    """
    # 1. Each position's function, packed: 2^BITS values of BITS bits.
    packed: tl.constexpr = tl.uint32 if BITS == 2 else tl.uint64
    step = following.to(packed)  # state 0: a span starts here
    for state in tl.static_range(1, 2**BITS):  # state s > 0: s − 1 left
        step |= tl.full((), (state - 1) << (BITS * state), packed)
    # 2. Inclusive scan of compositions: tokens left after each position.
    step = tl.associative_scan(step, 0, _compose)
    left = step & (2**BITS - 1)  # the composition applied to state 0, the row's left edge
    # 3. Where none are left, the next position starts a span; an exclusive scan of maxima gives the latest start.
    next_start = tl.where(left == 0, position + 1, 0)
    _, start = tl.associative_scan((next_start, next_start & 0), 0, _latest)
    return start


@triton.jit
def _kth_lowest(score, k, BITS: tl.constexpr):
    """The k-th lowest score, bit by bit: the largest number of BITS bits with fewer than k scores below it."""
    # From the highest bit: set it if fewer than k scores are below. One reduction over [BLOCK] per bit, no sort.
    limit = tl.full((), 0, score.dtype)
    bit = tl.full((), 1 << (BITS - 1), score.dtype)
    for _ in range(BITS):
        num_lower = tl.sum((score < (limit | bit)).to(tl.int32))
        limit = tl.where(num_lower < k, limit | bit, limit)
        bit >>= 1
    return limit


@triton.jit
def _count_weight(counts, selectable):
    """[BLOCK] uint32, the reference's weight of each count above the row's lowest; arbitrary if not selectable."""
    integer: tl.constexpr = tl.int32 if counts.dtype.primitive_bitwidth < 32 else tl.int64  # int32 saves registers
    counts = counts.to(integer)
    lowest = tl.min(tl.where(selectable, counts, 2 ** (integer.primitive_bitwidth - 1) - 1))
    above_lowest = tl.minimum(counts - lowest, _MAX_COUNT).to(tl.int32)
    weight = tl.full(counts.shape, _COUNT_WEIGHTS[0], tl.uint32)
    for count in tl.static_range(1, _MAX_COUNT + 1):
        weight = tl.where(above_lowest >= count, _COUNT_WEIGHTS[count], weight)
    return weight


@triton.jit
def _load_row(row_ptr, position, length, WHOLE_WORDS: tl.constexpr):
    """A row [BLOCK] of tokens or counts, zeros past the end; if WHOLE_WORDS, its last word is loaded whole."""
    end = length
    if WHOLE_WORDS:
        end = _whole_words(length, row_ptr.dtype.element_ty)
    return tl.load(row_ptr + position, mask=position < end, other=0)


@triton.jit
def _whole_words(length, TYPE: tl.constexpr):
    """`length` rounded up to whole words of 128 bits, in elements."""
    word: tl.constexpr = 128 // TYPE.primitive_bitwidth
    return tl.cdiv(length, word) * word


@triton.jit(do_not_specialize=[*_SCALARS, "length"])
def span_mask_kernel(
    tokens_ptr,
    row_ids_ptr,
    counts_ptr,
    inputs_ptr,
    labels_ptr,
    tokens_stride,
    counts_stride,
    outputs_stride,
    length: tl.int32,
    mask_p: tl.int64,
    random_limit: tl.int64,
    keep_limit: tl.int64,
    mask_token_id: tl.int64,
    vocab_size: tl.int64,
    num_special_tokens: tl.int64,
    max_span_length: tl.int64,
    seed: tl.int64,
    HAS_COUNTS: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE_WORDS: tl.constexpr,
):
    """One program per row [T]. Probabilities are fixed-point numbers with 32 fractional bits: 1 is 2³²."""
    # 1. Lanes, and the row's id, which is part of every counter.
    row = tl.program_id(0).to(tl.int64)
    position = tl.arange(0, BLOCK)
    inside = position < length
    row_id = tl.load(row_ids_ptr + row)
    seed = seed.to(tl.uint64)  # the interpreter narrows it to the bits of its value

    # 2. Words of each position; span lengths ⌊w·n/2³²⌋ + 1 give the spans' starts.
    length_word, _, _, random_word = _philox(seed, position, 0, row_id)
    start = _span_starts(position, tl.umulhi(length_word, max_span_length.to(tl.uint32)), BITS)
    # 3. Score and kind of each span, drawn again at its start; u of the row.
    _, score, kind, _ = _philox(seed, start, 0, row_id)  # shared by the span
    uniform, _, _, _ = _philox(seed, tl.full((), 0, tl.int32), 1, row_id)  # one per row

    # 4. Load the tokens, only now: earlier they would occupy registers. k = max(1, ⌊n·p + u⌋).
    tokens = _load_row(tokens_ptr + row * tokens_stride, position, length, WHOLE_WORDS)
    token_type: tl.constexpr = tokens.dtype
    selectable = inside & (tokens >= num_special_tokens)
    k = tl.sum(selectable.to(tl.int32)) * mask_p.to(tl.int64) + uniform.to(tl.int64)
    k = tl.maximum(k >> 32, 1)
    # 5. Select the k lowest scores, ties included; with counts, scores are weighted, 63 bits.
    if HAS_COUNTS:
        counts = _load_row(counts_ptr + row * counts_stride, position, length, WHOLE_WORDS)
        score = score.to(tl.uint64) * _count_weight(counts, selectable)
    score_bits: tl.constexpr = 63 if HAS_COUNTS else 32
    score = tl.where(selectable, score, 2**score_bits - 1)  # below no limit
    selected = selectable & (score <= _kth_lowest(score, k, score_bits))

    # 6. Replacement by kind: random token, the token itself, or <mask>. Labels are the selected tokens.
    num_ordinary = (vocab_size - num_special_tokens).to(tl.uint32)
    random_token = tl.umulhi(random_word, num_ordinary).to(tl.int64) + num_special_tokens
    kind = kind.to(tl.int64)
    replacement = tl.where(kind < keep_limit, tokens, mask_token_id.to(token_type))
    replacement = tl.where(kind < random_limit, random_token.to(token_type), replacement)
    inputs = tl.where(selected, replacement, tokens)
    labels = tl.where(selected, tokens, tl.full((), _IGNORE_INDEX, token_type))
    # 7. Write whole words of 128 bits; `position` last: a base address takes fewer registers than one per lane.
    written = position < _whole_words(length, token_type)
    tl.store(inputs_ptr + row * outputs_stride + position, inputs, mask=written)
    tl.store(labels_ptr + row * outputs_stride + position, labels, mask=written)


def supports(length: int, max_span_length: int) -> bool:
    """Whether the kernel takes rows and spans of these lengths."""
    return length <= MAX_LENGTH and max_span_length <= MAX_SPAN_LENGTH


def launch(
    tokens: Tensor,
    row_ids: Tensor,
    mask_counts: Tensor | None,
    *,
    mask_p: float,
    random_p: float,
    keep_p: float,
    mask_token_id: int,
    vocab_size: int,
    num_special_tokens: int,
    max_span_length: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """`kernels.span_mask.op.span_mask` for checked, supported inputs; the seed is signed.

    Returns:
        `inputs` and `labels`, from `padded_rows`; int32 for narrower tokens.
    """
    num_rows, length = tokens.shape
    tokens = tokens if tokens.dtype in _TOKEN_TYPES else tokens.int()
    tokens, row_ids = _dense_rows(tokens), row_ids.contiguous()
    counts = tokens
    if mask_counts is not None:  # uint8, as in the trainer, or int64: few variants
        counts = _dense_rows(mask_counts if mask_counts.dtype == torch.uint8 else mask_counts.long())
    inputs, labels = padded_rows(tokens), padded_rows(tokens)
    whole_words = _has_whole_words(tokens) and _has_whole_words(counts)
    options = _options(length, max_span_length, mask_counts is not None, 64 if torch.version.hip else 32)
    with torch.cuda.device_of(tokens):
        span_mask_kernel[(num_rows,)](
            tokens,
            row_ids,
            counts,
            inputs,
            labels,
            tokens.stride(0),
            counts.stride(0),
            inputs.stride(0),
            length,
            reference.fixed_point(mask_p),
            reference.fixed_point(random_p),
            reference.fixed_point(random_p + keep_p),
            mask_token_id,
            vocab_size,
            num_special_tokens,
            max_span_length,
            seed,
            WHOLE_WORDS=whole_words,
            **options,
            **({} if torch.version.hip else {"maxnreg": _max_registers(options["BLOCK"])}),
        )
    return inputs, labels


def _has_whole_words(rows: Tensor) -> bool:
    """Whether rows are aligned to 16 elements and 16 bytes, and the last row's last word is inside the storage."""
    ends = rows.storage_offset() + (len(rows) - 1) * rows.stride(0) + padded_length(rows.shape[1])
    fits = ends * rows.element_size() <= rows.untyped_storage().nbytes()
    return fits and rows.stride(0) % PADDING == rows.data_ptr() % 16 == 0


def configurations() -> list[Configuration]:
    """Every variant of the kernel that `launch` can start.

    Unaligned rows are read one token at a time: coalesced, the same bytes, but not in words of 128 bits. The trainer's
    rows, and all outputs, are aligned to 16 tokens.
    """
    blocks = [_MIN_BLOCK * 2**double for double in range((MAX_LENGTH // _MIN_BLOCK).bit_length())]
    variants = product(_TOKEN_TYPES.values(), blocks, (None, "u8", "i64"), (3, MAX_SPAN_LENGTH), (True, False))
    return [_configuration(*variant) for variant in variants]


def _options(length: int, max_span_length: int, has_counts: bool, warp_size: int) -> dict[str, Any]:
    block = max(_MIN_BLOCK, triton.next_power_of_2(length))
    return {
        "HAS_COUNTS": has_counts,
        "BITS": 2 if max_span_length <= 2**2 else 4,
        "BLOCK": block,
        "num_warps": fitting_warps(block // (32 * _ENTRIES_PER_THREAD), warp_size),
    }


def _max_registers(block: int) -> int | None:
    """Per thread, on NVIDIA: without a limit ptxas spills at one block size, to fit more programs; with it, at one."""
    return 128 if block < MAX_LENGTH else None


def _dense_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _configuration(
    token_type: str, length: int, counts_type: str | None, max_span_length: int, is_padded: bool
) -> Configuration:
    options = _options(length, max_span_length, counts_type is not None, 32)
    pointers = {f"{name}_ptr": f"*{token_type}" for name in ("tokens", "inputs", "labels")}
    pointers |= {"row_ids_ptr": "*i64", "counts_ptr": f"*{counts_type or token_type}"}
    strides = dict.fromkeys(("tokens_stride", "counts_stride", "outputs_stride"), "i32")
    name = f"span_mask/rows {token_type} T={length} spans to {max_span_length}"
    return Configuration(
        name + (f", {counts_type} counts" if counts_type else "") + ("" if is_padded else " (not padded)"),
        span_mask_kernel,
        {**pointers, **strides, "length": "i32", **dict.fromkeys(_SCALARS, "i64")},
        {"WHOLE_WORDS": is_padded, **{key: value for key, value in options.items() if key != "num_warps"}},
        num_warps=options["num_warps"],
        max_registers=_max_registers(options["BLOCK"]),
        aligned=frozenset(pointers) | (frozenset(strides) if is_padded else {"outputs_stride"}),
        streams=is_padded,
    )
