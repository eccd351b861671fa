"""Planted bugs in span masking's kernel; the operation's check must find each of them."""

import pytest

from kernels.span_mask.check import comparisons
from tests.mutation import mutated

pytestmark = pytest.mark.usefixtures("parallel_scans")


MUTANTS = {
    "span lengths of the wrong stream": ("_philox(seed, position, 0, row_id)", "_philox(seed, position, 1, row_id)"),
    "seed without its high half": ("seed.to(tl.uint32), (seed >> 32)", "seed.to(tl.uint32), (seed >> 63)"),
    "row id without its high half": ("(row_id >> 32).to(tl.uint32)", "(row_id >> 63).to(tl.uint32)"),
    "nine rounds": ("for _ in range(10):", "for _ in range(9):"),
    "first key that does not change": ("tl.add(key0, 0x9E3779B9,", "tl.add(key0, 0,"),
    "functions composed the other way round": (
        "first >> (bits * state)) & (2**bits - 1)\nvalue = (second",
        "second >> (bits * state)) & (2**bits - 1)\nvalue = (first",
    ),
    "one state too few": ("static_range(2**bits)", "static_range(2**bits - 1)"),
    "spans a token shorter": ("step = following.to(packed)", "step = tl.maximum(following, 1).to(packed) - 1"),
    "spans that never count down": ("(state - 1) << (BITS * state)", "state << (BITS * state)"),
    "spans of up to four": ("tl.umulhi(length_word, max_span_length", "tl.umulhi(length_word, 1 + max_span_length"),
    "a span begins where the last one ends": ("position + 1, 0)", "position, 0)"),
    "a span's last token begins the next": ("tl.maximum(first, second_but_last)", "tl.maximum(first, second)"),
    "tokens instead of spans": ("_philox(seed, start, 0, row_id)", "_philox(seed, position, 0, row_id)"),
    "kind and score are one number": ("kind = kind.to(tl.int64)", "kind = (score * 1).to(tl.int64)"),
    "special tokens selected": ("inside & (tokens >= num_special_tokens)", "inside & (tokens >= 0)"),
    "first ordinary token never selected": ("(tokens >= num_special_tokens)", "(tokens > num_special_tokens)"),
    "places behind the row counted": ("selectable = inside &", "selectable = (position < BLOCK) &"),
    "always rounded down": (" + uniform.to(tl.int64)", ""),
    "always rounded up": ("uniform.to(tl.int64)", "2**32 - 1"),
    "nothing selected where n·p is below one": ("tl.maximum(k >> 32, 1)", "k >> 32"),
    "one token more": ("num_lower < k,", "num_lower <= k,"),
    "the limit itself left out": ("score <= _kth_lowest(", "score < _kth_lowest("),
    "lowest bit of the limit missing": ("for _ in range(BITS):", "for _ in range(BITS - 1):"),
    "special tokens take part in the order": ("tl.where(selectable, score, 2*", "tl.where(inside, score, 2*"),
    "history ignored": ("score.to(tl.uint64) * _count_weight(counts, selectable)", "score.to(tl.uint64) * 128"),
    "tokens masked more often selected earlier": ("above_lowest >= count", "above_lowest < count"),
    "lowest count of special tokens": ("tl.where(selectable, counts, 2", "tl.where(counts >= 0, counts, 2"),
    "history of the first row": ("row * counts_stride", "0 * counts_stride"),
    "history without a limit": ("tl.minimum(counts - lowest, _MAX_COUNT)", "tl.minimum(counts - lowest, 12)"),
    "tokens of the first row": ("row * tokens_stride", "0 * tokens_stride"),
    "rows as if without gaps": ("row * tokens_stride", "row * length"),
    "random token of the span": ("_, score, kind, _ =", "_, score, kind, random_word ="),
    "random tokens may be special": ("+ num_special_tokens\n", "\n"),
    "random tokens beyond the vocabulary": ("(vocab_size - num_special_tokens).to(", "vocab_size.to("),
    "kept tokens masked": ("tl.where(kind < keep_limit, tokens,", "tl.where(kind < random_limit, tokens,"),
    "random tokens kept": ("tl.where(kind < random_limit, random", "tl.where(kind < 0, random"),
    "keep_p alone": ("fixed_point(random_p + keep_p)", "fixed_point(keep_p)"),
    "inputs with their labels": ("tl.where(selected, replacement, tokens)", "tl.where(selected, tokens, tokens)"),
    "labels everywhere": ("tl.where(selected, tokens, tl.full(", "tl.where(inside, tokens, tl.full("),
    "labels are what replaced": ("labels = tl.where(selected, tokens,", "labels = tl.where(selected, replacement,"),
    "last label not written": ("labels, mask=written)", "labels, mask=position < length - 1)"),
    "last input not written": ("inputs, mask=written)", "inputs, mask=position < length - 1)"),
    "last token not loaded": ("mask=position < end", "mask=position < end - 1"),
    "rows of results as if without gaps": ("inputs_ptr + row * outputs_stride", "inputs_ptr + row * length"),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_check_rejects_mutants(device, tmp_path, mutant):
    with mutated("kernels.span_mask.kernel", *MUTANTS[mutant], tmp_path):
        assert any(not result.passed for result in comparisons(device, "triton"))
