"""Span masking: known Philox outputs, and bitwise agreement with a sequential reference."""

import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.padding import padded_rows
from kernels.span_mask.reference import random_words
from tests.masking import MASK, SPECIAL, VOCAB, WORD, mask, some_tokens

pytestmark = pytest.mark.usefixtures("parallel_scans")


EXAMPLES = {"torch": 60, "triton": 20}


@pytest.fixture(params=EXAMPLES)
def backend(request):
    """Without C++: span masking has no C++ kernel."""
    return request.param


@pytest.mark.parametrize(
    ("position", "stream", "row_id", "seed", "answer"),
    [
        (0, 0, 0, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (WORD - 1, WORD - 1, -1, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (0x243F6A88, 0x85A308D3, 0x0370734413198A2E, 0x299F31D0A4093822, "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_numbers(position, stream, row_id, seed, answer):
    words = random_words(seed, torch.tensor([position]), stream, torch.tensor([row_id]))
    assert [f"{word.item():08x}" for word in words] == answer.split()


def philox_of_one(seed, position, stream, row_id):
    counter, key = [position, stream, row_id % WORD, row_id // WORD % WORD], [seed % WORD, seed // WORD % WORD]
    for _ in range(10):
        high0, low0 = divmod(counter[0] * 0xD2511F53, WORD)
        high1, low1 = divmod(counter[2] * 0xCD9E8D57, WORD)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) % WORD, (key[1] + 0xBB67AE85) % WORD]
    return counter


def sequential(tokens, seed, row_id, *, mask_p, random_p, keep_p, max_span_length=3, counts=None, vocab_size=VOCAB):
    """One row, left to right: docs/model.md#masked-objective as a loop."""
    draws = [philox_of_one(seed, position, 0, row_id) for position in range(len(tokens))]
    scores, kinds = [], []
    while len(scores) < len(tokens):
        length_word, score, kind, _ = draws[len(scores)]
        length = 1 + length_word * max_span_length // WORD
        scores += [score] * length
        kinds += [kind] * length
    selectable = [position for position, token in enumerate(tokens) if token >= SPECIAL]
    if not selectable:
        return list(tokens), [-100] * len(tokens)
    if counts:
        fewest = min(counts[position] for position in selectable)
        # softmax without the denominator, in fixed point so that it does not depend on the device
        weights = [round(128 * math.exp(min(max(count - fewest, 0), 16))) for count in counts]
        scores = [score * weight for score, weight in zip(scores, weights, strict=False)]
    uniform = philox_of_one(seed, 0, 1, row_id)[0]
    k = max(1, (len(selectable) * round(mask_p * WORD) + uniform) // WORD)
    limit = sorted(scores[position] for position in selectable)[k - 1]
    inputs, labels = list(tokens), [-100] * len(tokens)
    for position in selectable:
        if scores[position] > limit:
            continue
        labels[position] = tokens[position]
        if kinds[position] < round(random_p * WORD):
            inputs[position] = SPECIAL + draws[position][3] * (vocab_size - SPECIAL) // WORD
        elif kinds[position] >= round((random_p + keep_p) * WORD):
            inputs[position] = MASK
    return inputs, labels


def agrees_with_the_loop(backend, data):
    length = data.draw(st.integers(1, 40), label="length")
    dtype = data.draw(st.sampled_from([torch.int16, torch.int32, torch.int64]))
    counts_type = data.draw(st.sampled_from([torch.uint8, torch.int16, torch.int64]))
    token = st.one_of(st.integers(0, SPECIAL), st.integers(SPECIAL, VOCAB - 1))
    rows = data.draw(st.lists(st.lists(token, min_size=length, max_size=length), min_size=1, max_size=3))
    row_ids = data.draw(st.lists(st.integers(0, 2**63 - 1), min_size=len(rows), max_size=len(rows)))
    seed = data.draw(st.integers(0, 2**64 - 1), label="seed")
    shares = {"mask_p": data.draw(st.floats(0, 1)), "random_p": data.draw(st.floats(0, 0.5))}
    shares["keep_p"] = data.draw(st.floats(0, 0.5))
    spans = data.draw(st.integers(1, 6) | st.integers(7, 16), label="max_span_length")
    row_of_counts = st.lists(st.integers(0, 30), min_size=length, max_size=length)
    counts = data.draw(st.none() | st.lists(row_of_counts, min_size=len(rows), max_size=len(rows)))
    inputs, labels = mask(
        torch.tensor(rows, dtype=dtype),
        torch.tensor(row_ids),
        seed,
        max_span_length=spans,
        mask_counts=None if counts is None else torch.tensor(counts, dtype=counts_type),
        backend=backend,
        **shares,
    )
    assert inputs.dtype == labels.dtype == dtype
    for row, tokens in enumerate(rows):
        own_counts = counts[row] if counts else None
        expected = sequential(tokens, seed, row_ids[row], max_span_length=spans, counts=own_counts, **shares)
        assert (inputs[row].tolist(), labels[row].tolist()) == expected


def is_the_same_on_any_split(backend, order, cuts):
    tokens, row_ids = some_tokens(6, 50), torch.arange(6) + 2**40
    whole = mask(tokens, row_ids, backend=backend)
    pieces = [part for part in torch.tensor(order).tensor_split(sorted(cuts)) if len(part)]
    parts = [mask(tokens[part], row_ids[part], backend=backend) for part in pieces]
    for expected, actual in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(torch.cat(actual), expected[list(order)])


def test_agrees_exactly_with_a_loop_from_the_left(backend):
    given_both = given(st.just(backend), st.data())(agrees_with_the_loop)
    settings(max_examples=EXAMPLES[backend], deadline=None)(given_both)()


def test_a_row_does_not_depend_on_the_batch_around_it(backend):
    cuts = st.lists(st.integers(1, 5), max_size=3)
    given_all = given(st.just(backend), st.permutations(range(6)), cuts)(is_the_same_on_any_split)
    settings(max_examples=EXAMPLES[backend] // 5, deadline=None)(given_all)()


@pytest.mark.parametrize("high", [2**32, 2**40, 2**62])
def test_row_ids_count_in_all_their_bits(backend, high):
    tokens = torch.full((2, 128), 50)
    labels = mask(tokens, torch.tensor([7, 7 + high]), backend=backend)[1]
    assert not torch.equal(labels[0], labels[1])


@pytest.mark.parametrize("seed", [0, 1, 2**31 + 5, 2**32, 2**63, 2**64 - 2**33 - 1])
def test_seeds_count_in_all_their_bits(backend, seed):
    tokens = torch.full((1, 128), 50)
    labels = [mask(tokens, seed=number, backend=backend)[1] for number in (seed, seed + 2**33, seed ^ 1)]
    assert len(torch.cat(labels).unique(dim=0)) == 3
    assert torch.equal(labels[0], mask(tokens, seed=seed)[1])


def test_special_tokens_are_never_selected(backend):
    tokens = some_tokens(20, 64, lowest=0) % (2 * SPECIAL)
    inputs, labels = mask(tokens, mask_p=1.0, backend=backend)
    special = tokens < SPECIAL
    assert (labels[special] == -100).all()
    assert torch.equal(inputs[special], tokens[special])
    assert torch.equal(labels[~special], tokens[~special])


def test_rows_of_special_tokens_alone_have_no_labels(backend):
    tokens = torch.arange(SPECIAL).repeat(4, 3)
    counts = torch.randint(9, tokens.shape)
    for history in (None, counts):
        inputs, labels = mask(tokens, mask_p=1.0, mask_counts=history, backend=backend)
        assert torch.equal(inputs, tokens)
        assert (labels == -100).all()


def test_a_single_ordinary_token_is_always_selected(backend):
    tokens = torch.zeros(20, 20, dtype=torch.long)
    tokens[torch.arange(20), torch.arange(20)] = 77
    for mask_p in (0.0, 0.15):
        assert ((mask(tokens, mask_p=mask_p, backend=backend)[1] == 77).sum(1) == 1).all()


def test_equal_counts_change_nothing(backend):
    tokens = some_tokens(5, 64)
    without = mask(tokens, backend=backend)
    for count in (0, 1, 200, 255):
        counts = torch.where(tokens >= SPECIAL, count, 0).to(torch.uint8)
        counted = mask(tokens, mask_counts=counts, backend=backend)
        assert all(torch.equal(*pair) for pair in zip(without, counted, strict=True))


def test_tokens_masked_more_often_are_selected_later(backend):
    tokens = torch.full({"torch": (400, 600), "triton": (60, 4095)}[backend], 50)
    counts = (torch.arange(tokens.shape[1]) % 3).expand_as(tokens)
    labels = mask(tokens, mask_p=0.3, max_span_length=1, mask_counts=counts, backend=backend)[1]
    never, once, twice = ((labels[:, number::3] != -100).double().mean().item() for number in range(3))
    # a score uniform in [0, eᶜ) is below the limit x with probability min(1, x·e⁻ᶜ); Σ = 3·0.3
    x = 0.9 / (1 + math.exp(-1) + math.exp(-2))
    assert never == pytest.approx(x, abs=0.01)
    assert once == pytest.approx(x * math.exp(-1), abs=0.01)
    assert twice == pytest.approx(x * math.exp(-2), abs=0.01)


def test_every_token_gets_its_turn(backend):
    """With history, masking a tenth of the tokens fourteen times reaches nearly all of them."""
    tokens = torch.full({"torch": (200, 60), "triton": (3, 3000)}[backend], 50)
    counts = torch.zeros(tokens.shape, dtype=torch.uint8)
    for epoch in range(14):
        row_ids = torch.arange(len(tokens)) + 200 * epoch
        counts += mask(tokens, row_ids, mask_p=0.1, mask_counts=counts, backend=backend)[1] != -100
    assert (counts == 0).double().mean() < 0.08  # without history 0.9¹⁴ = 23 % would never be masked
    assert (counts > 5).double().mean() < 0.001


def test_arguments_are_left_alone_and_results_repeat(backend):
    tokens, counts = some_tokens(5, 31), some_tokens(5, 31, lowest=0) % 7
    before = tokens.clone(), counts.clone()
    first, second = (mask(tokens, mask_counts=counts, backend=backend) for _ in range(2))
    assert torch.equal(tokens, before[0])
    assert torch.equal(counts, before[1])
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


LENGTHS = (1, 2, 3, 31, 127, 128, 129, 255, 256, 257, 513, 1000, 2048, 4095, 4096)


@pytest.mark.parametrize("length", LENGTHS)
def test_odd_lengths_types_and_seeds_agree_with_the_loop(backend, length):
    """One row of each length; dtypes, seeds and settings vary with the length."""
    index = LENGTHS.index(length)
    tokens = some_tokens(1, length, lowest=0).to((torch.int64, torch.int32, torch.int16)[index % 3])
    counts_type = (None, torch.uint8, torch.int32, torch.uint32, torch.int64)[index % 5]
    counts = None if counts_type is None else some_tokens(1, length, lowest=0, seed=7) % 25
    row_id, seed = 2**63 - 1 - length, (2**64 - 1) // (index + 1)
    shares = {"mask_p": (0.15, 0.3, 1.0, 0.0)[index % 4], "random_p": 0.3, "keep_p": 0.2}
    spans = (3, 1, 16, 4, 5, 2)[index % 6]
    inputs, labels = mask(
        tokens,
        torch.tensor([row_id]),
        seed,
        max_span_length=spans,
        mask_counts=None if counts is None else counts.to(counts_type),
        backend=backend,
        **shares,
    )
    assert inputs.dtype == labels.dtype == tokens.dtype
    own_counts = None if counts is None else counts[0].tolist()
    expected = sequential(tokens[0].tolist(), seed, row_id, max_span_length=spans, counts=own_counts, **shares)
    assert (inputs[0].tolist(), labels[0].tolist()) == expected


@pytest.mark.parametrize("special", [-5, 0, 16])
def test_tokens_of_one_byte(backend, special):
    tokens = (some_tokens(3, 70, lowest=0) % 256 - 128).to(torch.int8)
    settings = {"vocab_size": 128, "num_special_tokens": special, "random_p": 0.5}
    results = mask(tokens, backend=backend, **settings)
    assert all(torch.equal(*pair) for pair in zip(results, mask(tokens, **settings), strict=True))
    selected = results[1] != -100
    assert (tokens[selected] >= special).all()
    assert (results[0][selected & (results[0] != MASK)] >= special).all()


def test_rows_may_lie_anywhere_in_memory(backend):
    tokens, counts = some_tokens(6, 50), some_tokens(6, 50, lowest=0) % 5
    row_ids = torch.arange(6) * 3
    expected = mask(tokens, row_ids, mask_counts=counts)
    wide = torch.stack([tokens, tokens + 1], dim=2).flatten(1)
    for layout in (tokens.T.contiguous().T, wide[:, ::2], torch.cat([tokens, tokens], 1)[:, :50]):
        for other in (counts.T.contiguous().T, torch.cat([counts, counts], 1)[:, :50]):
            results = mask(layout, (torch.arange(12) * 3 // 2)[::2], mask_counts=other, backend=backend)
            assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))
            assert all(tensor.stride() == ({"torch": 50, "triton": 64}[backend], 1) for tensor in results)
    same = mask(tokens[:1].expand(6, -1), row_ids, backend=backend)
    assert all(torch.equal(*pair) for pair in zip(same, mask(tokens[:1].repeat(6, 1), row_ids), strict=True))


EDGES = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 2**31, 2**64 - 1)


@pytest.mark.parametrize("seed", EDGES)
def test_numbers_at_the_edges_of_their_types(backend, seed):
    """Values that fail if an implementation uses too few bits or the wrong signedness."""
    index, half = EDGES.index(seed), 2**-1 + 2**-32
    tokens = some_tokens(1, 60, lowest=0)
    settings = {
        "mask_p": (0.0, 2**-32, half, 1.0)[index % 4],
        "random_p": (half, 1.0, 0.0, 2**-32)[index // 2 % 4],
        "keep_p": (0.0, 0.0, half, 1 - 2**-32)[index // 2 % 4],
        "vocab_size": (2**31, 2**31 - 1, SPECIAL + 1)[index % 3],
        "mask_token_id": (2**31 - 1, 0)[index % 2],
    }
    row_ids = torch.tensor([(EDGES[-1 - index] + 2**63) % 2**64 - 2**63])
    results = mask(tokens, row_ids, seed, backend=backend, **settings)
    assert all(torch.equal(*pair) for pair in zip(results, mask(tokens, row_ids, seed, **settings), strict=True))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_nothing_to_mask(backend, shape):
    tokens = torch.zeros(shape, dtype=torch.int32)
    assert all(tensor.shape == shape and tensor.dtype == torch.int32 for tensor in mask(tokens, backend=backend))


@pytest.mark.parametrize(
    "changes",
    [
        {"mask_p": -0.01}, {"mask_p": 1.01}, {"mask_p": math.nan}, {"random_p": -0.1}, {"keep_p": -0.1},
        {"random_p": 0.6, "keep_p": 0.5}, {"vocab_size": SPECIAL}, {"random_p": math.nan},
    ],
)  # fmt: skip
def test_shares_outside_their_range_are_errors(backend, changes):
    with pytest.raises(ValueError, match=r"shares lie in|leaves no token"):
        mask(torch.full((1, 4), 50), backend=backend, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": torch.zeros(4, dtype=torch.int64)}, r"tokens: torch.int64 \[4\]"),
        ({"tokens": torch.zeros(1, 4, dtype=torch.uint8)}, r"tokens: torch.uint8 .*expected signed integers \[B, T\]"),
        ({"row_ids": torch.zeros(2, dtype=torch.int64)}, r"row_ids: .*expected int64 \[1\] on cpu"),
        ({"row_ids": torch.zeros(1, dtype=torch.int32)}, r"row_ids: torch.int32"),
        ({"mask_counts": torch.zeros(1, 4)}, r"mask_counts: torch.float32 .*expected integers \[1, 4\]"),
        ({"mask_counts": torch.zeros(1, 5, dtype=torch.uint8)}, r"mask_counts: torch.uint8 \[1, 5\]"),
        ({"mask_counts": torch.zeros(1, 4, dtype=torch.bool)}, r"mask_counts: torch.bool"),
        ({"max_span_length": 0}, "max_span_length 0"),
        ({"tokens": torch.zeros(1, 4, dtype=torch.int8)}, "vocab_size 1000, .*the largest id in torch.int8 is 127"),
        ({"vocab_size": 2**31 + 1}, "the largest id"),
        ({"mask_token_id": 2**31}, "the largest id"),
    ],
)
def test_what_does_not_fit_together_is_one_clear_error(backend, changes, message):
    with pytest.raises(ValueError, match=message):
        mask(**{"tokens": torch.full((1, 4), 50), **changes}, backend=backend)


@pytest.mark.parametrize(("length", "spans"), [(4097, 3), (40, 17)])
def test_what_the_kernel_cannot_hold_is_computed_by_pytorch(length, spans):
    tokens = some_tokens(2, length)
    results = [mask(tokens, max_span_length=spans, backend=backend) for backend in EXAMPLES]
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert (results[0][1] != -100).any()


def test_uninitialized_memory_is_overwritten(backend, monkeypatch):
    """torch.empty returns the dtype's largest integer here, so reading it before writing changes the result."""
    expected = [mask(some_tokens(3, length), vocab_size=500) for length in (1, 129, 600)]
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert (torch.empty(3, dtype=torch.int64) == 2**63 - 1).all()
        results = [mask(some_tokens(3, length), vocab_size=500, backend=backend) for length in (1, 129, 600)]
    finally:
        torch.use_deterministic_algorithms(False)
    for actual, wanted in zip(results, expected, strict=True):
        assert all(torch.equal(*pair) for pair in zip(actual, wanted, strict=True))


@pytest.mark.parametrize("length", [127, 128, 129, 130])
def test_memory_around_the_results_is_left_alone(monkeypatch, length):
    """Beside a row, only the rest of its last 128-bit word (two tokens) may be written."""
    padded, whole_words = -(-length // 16) * 16, -(-length // 2) * 2
    blocks = []

    def guarded(tokens):
        blocks.append(torch.full((2 * 300 + len(tokens) * padded,), -7))
        return blocks[-1][300:-300].view(len(tokens), padded)[:, :length]

    monkeypatch.setattr(importlib.import_module("kernels.span_mask.kernel"), "padded_rows", guarded)
    mask(some_tokens(3, length), mask_counts=torch.zeros(3, length, dtype=torch.uint8), backend="triton")
    assert len(blocks) == 2
    for block in blocks:
        rows = block[300:-300].view(3, padded)
        assert (rows[:, :length] != -7).all()
        assert (rows[:, whole_words:] == -7).all()
        assert (block[:300] == -7).all()
        assert (block[-300:] == -7).all()


def test_what_stands_between_padded_rows_changes_nothing(backend):
    """The padding has ordinary tokens and large counts: they may be loaded, but must not be selected or counted."""
    tokens, counts = some_tokens(3, 144), torch.full((3, 144), 200, dtype=torch.uint8)
    counts[:, :129] = (some_tokens(3, 129, lowest=0) % 5).to(torch.uint8)
    counts[:, 129:] = torch.tensor([0, 200, 3], dtype=torch.uint8)[:, None]
    results = mask(tokens[:, :129], mask_counts=counts[:, :129], backend=backend)
    expected = mask(tokens[:, :129].contiguous(), mask_counts=counts[:, :129].contiguous())
    assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))


def test_rows_whose_last_word_is_not_theirs_are_not_loaded_in_words():
    kernel = importlib.import_module("kernels.span_mask.kernel")
    memory = torch.zeros(3 * 144 + 1, dtype=torch.int64)
    assert kernel._has_whole_words(memory[: 3 * 144].view(3, 144)[:, :129])
    assert kernel._has_whole_words(padded_rows(torch.zeros(3, 129, dtype=torch.int64))), "as in the trainer"
    assert not kernel._has_whole_words(memory[1:].view(3, 144)[:, :129]), "begins inside a word"
    assert not kernel._has_whole_words(memory[: 3 * 129].view(3, 129)), "rows begin inside words"
    short = memory[: 2 * 144 + 129].clone()
    assert not kernel._has_whole_words(short.as_strided((3, 129), (144, 1))), "the last row's memory ends with it"
