"""Span masking: known Philox answers, a sequential oracle that must agree exactly, and statistics."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import span_mask
from kernels.span_mask.reference import philox

SPECIAL, VOCAB, MASK = 16, 1000, 4
WORD = 2**32
SHARES = {"mask_p": 0.3, "random_p": 0.1, "keep_p": 0.1}
ALL = {**SHARES, "mask_token_id": MASK, "vocab_size": VOCAB, "num_special_tokens": SPECIAL}


def mask(tokens, row_ids=None, seed=1, **changes):
    row_ids = torch.arange(len(tokens)) if row_ids is None else row_ids
    return span_mask(tokens, seed=seed, row_ids=row_ids, **{**ALL, **changes})


@pytest.fixture(scope="module")
def million():
    """A million ordinary tokens, and what became of them."""
    tokens = torch.randint(SPECIAL, VOCAB, (8000, 128), generator=torch.Generator().manual_seed(3))
    return tokens, *mask(tokens)


@pytest.mark.parametrize(
    ("position", "stream", "row_id", "seed", "answer"),
    [
        (0, 0, 0, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (WORD - 1, WORD - 1, -1, 2**64 - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (0x243F6A88, 0x85A308D3, 0x0370734413198A2E, 0x299F31D0A4093822, "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_published_numbers(position, stream, row_id, seed, answer):
    words = philox(seed, torch.tensor([position]), stream, torch.tensor([row_id]))
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
    """One row, from the left: spec.md §3 as a loop."""
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
        # the softmax without its divisor, in fixed point so that it does not depend on the device
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


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_agrees_exactly_with_a_loop_from_the_left(data):
    length = data.draw(st.integers(1, 40), label="length")
    dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))
    token = st.one_of(st.integers(0, SPECIAL), st.integers(SPECIAL, VOCAB - 1))
    rows = data.draw(st.lists(st.lists(token, min_size=length, max_size=length), min_size=1, max_size=4))
    row_ids = data.draw(st.lists(st.integers(0, 2**63 - 1), min_size=len(rows), max_size=len(rows)))
    seed = data.draw(st.integers(0, 2**64 - 1), label="seed")
    shares = {"mask_p": data.draw(st.floats(0, 1)), "random_p": data.draw(st.floats(0, 0.5))}
    shares["keep_p"] = data.draw(st.floats(0, 0.5))
    spans = data.draw(st.integers(1, 6), label="max_span_length")
    row_of_counts = st.lists(st.integers(0, 30), min_size=length, max_size=length)
    counts = data.draw(st.none() | st.lists(row_of_counts, min_size=len(rows), max_size=len(rows)))
    inputs, labels = mask(
        torch.tensor(rows, dtype=dtype),
        torch.tensor(row_ids),
        seed,
        max_span_length=spans,
        mask_counts=None if counts is None else torch.tensor(counts, dtype=torch.uint8),
        **shares,
    )
    assert inputs.dtype == labels.dtype == dtype
    for row, tokens in enumerate(rows):
        own_counts = counts[row] if counts else None
        expected = sequential(tokens, seed, row_ids[row], max_span_length=spans, counts=own_counts, **shares)
        assert (inputs[row].tolist(), labels[row].tolist()) == expected


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(12)), st.lists(st.integers(1, 11), max_size=4))
def test_a_row_does_not_depend_on_the_batch_around_it(order, cuts):
    tokens = torch.randint(10, VOCAB, (12, 50), generator=torch.Generator().manual_seed(5))
    row_ids = torch.arange(12) + 2**40
    whole = mask(tokens, row_ids)
    parts = [mask(tokens[part], row_ids[part]) for part in torch.tensor(order).tensor_split(sorted(cuts)) if len(part)]
    for expected, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(torch.cat(pieces), expected[list(order)])


def test_labels_are_the_selected_tokens_and_the_rest_is_untouched(million):
    tokens, inputs, labels = million
    selected = labels != -100
    assert torch.equal(labels[selected], tokens[selected])
    assert torch.equal(inputs[~selected], tokens[~selected])
    assert ((inputs == tokens) | (inputs == MASK) | (inputs >= SPECIAL)).all()
    assert inputs.max() < VOCAB


def test_rate_and_kinds_of_replacement(million):
    tokens, inputs, labels = million
    selected = labels != -100
    # the span at the limit is taken whole: at most two tokens a row above n·p
    rate = selected.double().mean().item()
    assert 0.3 <= rate < 0.3 + 2 / 128
    share_masked = (inputs[selected] == MASK).double().mean().item()
    share_kept = (inputs[selected] == tokens[selected]).double().mean().item()
    assert share_masked == pytest.approx(0.8, abs=0.005)
    assert share_kept == pytest.approx(0.1 + 0.1 / (VOCAB - SPECIAL), abs=0.005)


def test_rate_is_unbiased_when_spans_are_single_tokens():
    tokens = torch.full((20000, 33), 50)
    selected = mask(tokens, mask_p=0.15, max_span_length=1)[1] != -100
    assert set(selected.sum(1).tolist()) == {4, 5}  # 33 · 0.15 = 4.95, rounded up and down at random
    assert selected.double().sum(1).mean().item() == pytest.approx(4.95, abs=0.01)


def test_random_tokens_are_uniform_over_ordinary_tokens():
    tokens = torch.full((6000, 128), 50)
    inputs, labels = mask(tokens, mask_p=1.0, random_p=1.0, keep_p=0.0, vocab_size=26)
    assert (labels == 50).all()
    assert set(inputs.unique().tolist()) == set(range(SPECIAL, 26))
    shares = torch.bincount(inputs.flatten())[SPECIAL:].double() / inputs.numel()
    assert (shares - 0.1).abs().max() < 0.002
    repeats = (inputs[:, 1:] == inputs[:, :-1]).double().mean().item()
    assert repeats == pytest.approx(0.1, abs=0.003)  # drawn per token, not per span


def test_span_lengths_are_uniform():
    """With k = 1 exactly one span is selected, and nothing hides its length."""
    labels = mask(torch.full((20000, 30), 50), mask_p=0.0)[1]
    lengths = (labels != -100).sum(1)
    inner = (labels[:, 0] == -100) & (labels[:, -1] == -100)  # spans at the edges are cut
    shares = torch.bincount(lengths[inner]).double() / inner.sum()
    assert len(shares) == 4
    assert (shares[1:] - 1 / 3).abs().max() < 0.01
    runs = (labels[:, 1:] != -100) & (labels[:, :-1] == -100)
    assert (runs.sum(1) + (labels[:, 0] != -100) == 1).all()


def test_positions_are_selected_equally(million):
    selected = (million[2] != -100).double().mean(0)
    sigma = math.sqrt(0.3 * 0.7 / 8000)
    assert (selected - selected.mean()).abs().max() < 5 * sigma
    assert abs(selected[:3].mean() - selected.mean()) < 4 * sigma
    assert abs(selected[-3:].mean() - selected.mean()) < 4 * sigma


def test_two_rows_or_two_seeds_never_share_a_mask(million):
    masks = million[2] != -100
    assert len(masks.unique(dim=0)) == len(masks)
    others = mask(million[0], seed=2)[1] != -100
    agree = (masks & others).double().mean() / masks.double().mean()
    assert agree == pytest.approx(others.double().mean().item(), abs=0.01)  # independent: as often as chance
    assert len(torch.cat([masks, others]).unique(dim=0)) == 2 * len(masks)


@pytest.mark.parametrize("high", [2**32, 2**40, 2**62])
def test_row_ids_count_in_all_their_bits(high):
    tokens = torch.full((2, 128), 50)
    labels = mask(tokens, torch.tensor([7, 7 + high]))[1]
    assert not torch.equal(labels[0], labels[1])


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63])
def test_seeds_count_in_all_their_bits(seed):
    tokens = torch.full((1, 128), 50)
    assert not torch.equal(mask(tokens, seed=seed)[1], mask(tokens, seed=seed + 2**33)[1])


def test_special_tokens_are_never_selected():
    tokens = torch.randint(0, 2 * SPECIAL, (300, 64), generator=torch.Generator().manual_seed(1))
    inputs, labels = mask(tokens, mask_p=1.0)
    special = tokens < SPECIAL
    assert (labels[special] == -100).all()
    assert torch.equal(inputs[special], tokens[special])
    assert torch.equal(labels[~special], tokens[~special])


def test_rows_of_special_tokens_alone_have_no_labels():
    tokens = torch.arange(SPECIAL).repeat(4, 3)
    counts = torch.randint(9, tokens.shape)
    for inputs, labels in (mask(tokens, mask_p=1.0), mask(tokens, mask_counts=counts)):
        assert torch.equal(inputs, tokens)
        assert (labels == -100).all()


def test_a_single_ordinary_token_is_always_selected():
    tokens = torch.zeros(200, 20, dtype=torch.long)
    tokens[torch.arange(200), torch.arange(200) % 20] = 77
    for labels in (mask(tokens, mask_p=0.0)[1], mask(tokens, mask_p=0.15)[1]):
        assert ((labels == 77).sum(1) == 1).all()


def test_equal_counts_change_nothing():
    tokens = torch.randint(10, VOCAB, (50, 64), generator=torch.Generator().manual_seed(2))
    for count in (0, 1, 200, 255):
        counts = torch.where(tokens >= SPECIAL, count, 0).to(torch.uint8)
        for plain, counted in zip(mask(tokens), mask(tokens, mask_counts=counts), strict=True):
            assert torch.equal(plain, counted)


def test_tokens_masked_more_often_are_selected_later():
    tokens = torch.full((400, 600), 50)
    counts = (torch.arange(600) % 3).expand_as(tokens)
    selected = (mask(tokens, mask_p=0.3, max_span_length=1, mask_counts=counts)[1] != -100).double()
    never, once, twice = (selected[:, number::3].mean().item() for number in range(3))
    # a score uniform in [0, eᶜ) is below the limit x with probability min(1, x·e⁻ᶜ); Σ = 3·0.3
    x = 0.9 / (1 + math.exp(-1) + math.exp(-2))
    assert never == pytest.approx(x, abs=0.01)
    assert once == pytest.approx(x * math.exp(-1), abs=0.01)
    assert twice == pytest.approx(x * math.exp(-2), abs=0.01)


def test_every_token_gets_its_turn():
    """Masking a tenth of the tokens ten times over, with history, reaches nearly all of them."""
    tokens, counts = torch.full((200, 60), 50), torch.zeros(200, 60, dtype=torch.uint8)
    for epoch in range(14):
        row_ids = torch.arange(200) + 200 * epoch
        counts += mask(tokens, row_ids, mask_p=0.1, mask_counts=counts)[1] != -100
    assert (counts == 0).double().mean() < 0.06  # without history 0.9¹⁴ = 23 % are left out
    assert (counts > 5).double().mean() < 0.001


def test_arguments_are_left_alone_and_results_repeat():
    tokens = torch.randint(10, VOCAB, (9, 31), generator=torch.Generator().manual_seed(4))
    before = tokens.clone()
    first, second = mask(tokens), mask(tokens)
    assert torch.equal(tokens, before)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.parametrize(
    "changes",
    [
        {"mask_p": -0.01}, {"mask_p": 1.01}, {"mask_p": math.nan}, {"random_p": -0.1}, {"keep_p": -0.1},
        {"random_p": 0.6, "keep_p": 0.5}, {"vocab_size": SPECIAL}, {"random_p": math.nan},
    ],
)  # fmt: skip
def test_shares_outside_their_range_are_errors(changes):
    with pytest.raises(ValueError, match=r"shares lie in|leaves no token|NaN"):
        mask(torch.full((1, 4), 50), **changes)
