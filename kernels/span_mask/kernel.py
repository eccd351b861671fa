"""Span masking of a batch in one launch: a program holds a row in registers, reads it once and writes it once.

Positions are the lanes of a block. Nothing is gathered: where a span starts is scanned along the row, and the random
numbers that belong to the start are drawn there again.
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
MAX_SPAN_LENGTH = 16  # 2⁴ states of four bits fill a 64-bit number; 2² of two do where spans are up to 4
_MIN_BLOCK = 256  # one warp of threads with _ENTRIES_PER_THREAD
_ENTRIES_PER_THREAD = 8  # twice 128 bits of int32, on AMD once
_TOKEN_TYPES = {torch.int32: "i32", torch.int64: "i64"}  # narrower ones would make narrow words, and more to compile
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
    """Philox4x32-10 as the reference's: four 32-bit numbers for each position.

    `tl.philox` gives the same, but its unrolled rounds keep the key of each in a register from call to call.
    """
    word0 = position.to(tl.uint32)
    zeros = word0 & 0
    word1, word2, word3 = zeros + stream, zeros + row_id.to(tl.uint32), zeros + (row_id >> 32).to(tl.uint32)
    key0, key1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in range(10):
        high0, low0 = tl.umulhi(word0, 0xD2511F53), tl.mul(word0, 0xD2511F53, sanitize_overflow=False)
        high1, low1 = tl.umulhi(word2, 0xCD9E8D57), tl.mul(word2, 0xCD9E8D57, sanitize_overflow=False)
        word0, word1, word2, word3 = high1 ^ word1 ^ key0, low1, high0 ^ word3 ^ key1, low0
        key0 = tl.add(key0, 0x9E3779B9, sanitize_overflow=False)
        key1 = tl.add(key1, 0xBB67AE85, sanitize_overflow=False)
    return word0, word1, word2, word3


@triton.jit
def _compose(first, second):
    """The function `second` after `first`, each packed into an integer: the values of its states, the lowest first."""
    bits: tl.constexpr = 2 if first.dtype == tl.uint32 else 4
    composed = first & 0
    for state in tl.static_range(2**bits):
        value = (first >> (bits * state)) & (2**bits - 1)
        value = (second >> (bits * value)) & (2**bits - 1)
        composed |= value << (bits * state)
    return composed


@triton.jit
def _latest(first, first_but_last, second, second_but_last):  # noqa: ARG001 - a scan passes it
    """Maxima of two stretches together: of all positions, and of all but the last, since lanes know no neighbors."""
    return tl.maximum(first, second), tl.maximum(first, second_but_last)


@triton.jit
def _span_starts(position, following, BITS: tl.constexpr):
    """Where the span of each position starts, if spans tile the row from the left.

    A span that starts at a position has `following` tokens after it, fewer than 2^BITS. As in the reference, a position
    is a function from "tokens left of the running span" to the same one step on, and a scan composes them.
    """
    packed: tl.constexpr = tl.uint32 if BITS == 2 else tl.uint64
    step = following.to(packed)  # with none left a span starts
    for state in tl.static_range(1, 2**BITS):  # with some left there is one less
        step |= tl.full((), (state - 1) << (BITS * state), packed)
    step = tl.associative_scan(step, 0, _compose)
    left = step & (2**BITS - 1)  # from the row's edge, where none are left
    next_start = tl.where(left == 0, position + 1, 0)
    _, start = tl.associative_scan((next_start, next_start & 0), 0, _latest)
    return start


@triton.jit
def _kth_lowest(score, k, BITS: tl.constexpr):
    """The k-th lowest score, bit by bit: the largest number of BITS bits that fewer than k scores lie below."""
    limit = tl.full((), 0, score.dtype)
    bit = tl.full((), 1 << (BITS - 1), score.dtype)
    for _ in range(BITS):
        num_lower = tl.sum((score < (limit | bit)).to(tl.int32))
        limit = tl.where(num_lower < k, limit | bit, limit)
        bit >>= 1
    return limit


@triton.jit
def _count_weight(counts, selectable):
    """The reference's weight of each count above the lowest; that of a token that is not selectable is arbitrary."""
    integer: tl.constexpr = tl.int32 if counts.dtype.primitive_bitwidth < 32 else tl.int64  # the narrower, for space
    counts = counts.to(integer)
    lowest = tl.min(tl.where(selectable, counts, 2 ** (integer.primitive_bitwidth - 1) - 1))
    above_lowest = tl.minimum(counts - lowest, _MAX_COUNT).to(tl.int32)
    weight = tl.full(counts.shape, _COUNT_WEIGHTS[0], tl.uint32)
    for count in tl.static_range(1, _MAX_COUNT + 1):
        weight = tl.where(above_lowest >= count, _COUNT_WEIGHTS[count], weight)
    return weight


@triton.jit
def _load_row(row_ptr, position, length, WHOLE_WORDS: tl.constexpr):
    """A row of tokens or counts; what stands behind it in its last word too, if WHOLE_WORDS."""
    end = length
    if WHOLE_WORDS:
        end = _whole_words(length, row_ptr.dtype.element_ty)
    return tl.load(row_ptr + position, mask=position < end, other=0)


@triton.jit
def _whole_words(length, TYPE: tl.constexpr):
    """The number of entries in the words of 128 bits that `length` of them begin."""
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
    """One program a row. Probabilities are 32-bit fixed-point numbers, so that 1 is 2³²."""
    row = tl.program_id(0).to(tl.int64)
    position = tl.arange(0, BLOCK)
    inside = position < length
    row_id = tl.load(row_ids_ptr + row)
    seed = seed.to(tl.uint64)  # the interpreter holds it in as few bits as its value needs

    length_word, _, _, random_word = _philox(seed, position, 0, row_id)
    start = _span_starts(position, tl.umulhi(length_word, max_span_length.to(tl.uint32)), BITS)
    _, score, kind, _ = _philox(seed, start, 0, row_id)  # a span's are those of its start
    uniform, _, _, _ = _philox(seed, tl.full((), 0, tl.int32), 1, row_id)  # the row's own

    # loaded here and not first, when they would only take up registers
    tokens = _load_row(tokens_ptr + row * tokens_stride, position, length, WHOLE_WORDS)
    token_type: tl.constexpr = tokens.dtype
    selectable = inside & (tokens >= num_special_tokens)
    k = tl.sum(selectable.to(tl.int32)) * mask_p.to(tl.int64) + uniform.to(tl.int64)
    k = tl.maximum(k >> 32, 1)
    if HAS_COUNTS:
        counts = _load_row(counts_ptr + row * counts_stride, position, length, WHOLE_WORDS)
        score = score.to(tl.uint64) * _count_weight(counts, selectable)
    score_bits: tl.constexpr = 63 if HAS_COUNTS else 32
    score = tl.where(selectable, score, 2**score_bits - 1)  # which is below no limit
    selected = selectable & (score <= _kth_lowest(score, k, score_bits))

    num_ordinary = (vocab_size - num_special_tokens).to(tl.uint32)
    random_token = tl.umulhi(random_word, num_ordinary).to(tl.int64) + num_special_tokens
    kind = kind.to(tl.int64)
    replacement = tl.where(kind < keep_limit, tokens, mask_token_id.to(token_type))
    replacement = tl.where(kind < random_limit, random_token.to(token_type), replacement)
    inputs = tl.where(selected, replacement, tokens)
    labels = tl.where(selected, tokens, tl.full((), _IGNORE_INDEX, token_type))
    # a position is added last: one address for all lanes takes fewer registers than one each
    written = position < _whole_words(length, token_type)
    tl.store(inputs_ptr + row * outputs_stride + position, inputs, mask=written)
    tl.store(labels_ptr + row * outputs_stride + position, labels, mask=written)


def supports(length: int, max_span_length: int) -> bool:
    """Whether the kernel can hold such rows and spans."""
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
    """`kernels.span_mask.op.span_mask` for what it has checked and `supports`, with the seed as a signed number.

    Returns:
        `inputs` and `labels`, from `padded_rows`; int32 for narrower tokens.
    """
    num_rows, length = tokens.shape
    tokens = tokens if tokens.dtype in _TOKEN_TYPES else tokens.int()
    tokens, row_ids = _dense_rows(tokens), row_ids.contiguous()
    counts = tokens
    if mask_counts is not None:  # of one byte, as the trainer's are, or of eight: few kernels to compile
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
    """Whether rows begin at multiples of 16 entries and of 16 bytes, and the last one's last word is theirs to read."""
    ends = rows.storage_offset() + (len(rows) - 1) * rows.stride(0) + padded_length(rows.shape[1])
    fits = ends * rows.element_size() <= rows.untyped_storage().nbytes()
    return fits and rows.stride(0) % PADDING == rows.data_ptr() % 16 == 0


def configurations() -> list[Configuration]:
    """Every way in which `launch` can start the kernel.

    Rows that begin anywhere in memory are read in words of one token: as many bytes, coalesced, but no 128 bits at a
    time. Those of the trainer, and all that are written, begin at multiples of 16 tokens.
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
    """A thread's, on NVIDIA: at one block ptxas, left alone, spills to fit in more programs, and at one if told so."""
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
