"""Statistics of span masking on a million tokens: rates, replacements, lengths, positions, and independent masks."""

import math

import pytest
import torch

from tests.masking import MASK, SPECIAL, VOCAB, mask, some_tokens

pytestmark = pytest.mark.usefixtures("parallel_scans")


MANY_ROWS = {"torch": 34_000, "triton": 60}  # the interpreter takes about 0.04 s per row


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    """There is no kernel in C++."""
    return request.param


@pytest.fixture(scope="module", params=[("torch", (8000, 128)), ("triton", (250, 4096))], ids=["torch", "triton"])
def million(request):
    """A million ordinary tokens and their masking result."""
    backend, shape = request.param
    tokens = some_tokens(*shape, lowest=SPECIAL, seed=3)
    return tokens, *mask(tokens, backend=backend)


def test_labels_are_the_selected_tokens_and_the_rest_is_untouched(million):
    tokens, inputs, labels = million
    selected = labels != -100
    assert torch.equal(labels[selected], tokens[selected])
    assert torch.equal(inputs[~selected], tokens[~selected])
    assert ((inputs == tokens) | (inputs == MASK) | (inputs >= SPECIAL)).all()
    assert inputs.max() < VOCAB


def test_backends_agree_on_a_million_tokens(million):
    tokens, *actual = million
    assert tokens.numel() >= 1_000_000
    assert all(torch.equal(*pair) for pair in zip(actual, mask(tokens), strict=True))


def test_rate_and_kinds_of_replacement(million):
    tokens, inputs, labels = million
    selected = labels != -100
    # the span at the limit is taken whole: at most two tokens per row above n·p
    rate = selected.double().mean().item()
    assert 0.3 <= rate < 0.3 + 2 / tokens.shape[1]
    share_masked = (inputs[selected] == MASK).double().mean().item()
    share_kept = (inputs[selected] == tokens[selected]).double().mean().item()
    assert share_masked == pytest.approx(0.8, abs=0.005)
    assert share_kept == pytest.approx(0.1 + 0.1 / (VOCAB - SPECIAL), abs=0.005)


def test_rate_is_unbiased_when_spans_are_single_tokens(backend):
    rows = MANY_ROWS[backend]
    selected = mask(torch.full((rows, 33), 50), mask_p=0.15, max_span_length=1, backend=backend)[1] != -100
    assert set(selected.sum(1).tolist()) == {4, 5}  # 33 · 0.15 = 4.95, rounded up or down at random
    assert selected.double().sum(1).mean().item() == pytest.approx(4.95, abs=5 * math.sqrt(0.95 * 0.05 / rows))


def test_random_tokens_are_uniform_over_ordinary_tokens(backend):
    tokens = torch.full({"torch": (8000, 128), "triton": (40, 4096)}[backend], 50)
    inputs, labels = mask(tokens, mask_p=1.0, random_p=1.0, keep_p=0.0, vocab_size=26, backend=backend)
    assert (labels == 50).all()
    assert set(inputs.unique().tolist()) == set(range(SPECIAL, 26))
    sigma = math.sqrt(0.1 * 0.9 / inputs.numel())
    shares = torch.bincount(inputs.flatten())[SPECIAL:].double() / inputs.numel()
    assert (shares - 0.1).abs().max() < 5 * sigma
    repeats = (inputs[:, 1:] == inputs[:, :-1]).double().mean().item()
    assert repeats == pytest.approx(0.1, abs=5 * sigma)  # drawn per token, not per span


def test_span_lengths_are_uniform(backend):
    """With k = 1 exactly one span is selected, so its length is visible. A million tokens with torch."""
    labels = mask(torch.full((MANY_ROWS[backend], 30), 50), mask_p=0.0, backend=backend)[1]
    lengths = (labels != -100).sum(1)
    inner = (labels[:, 0] == -100) & (labels[:, -1] == -100)  # spans at the edges are cut
    shares = torch.bincount(lengths[inner]).double() / inner.sum()
    assert len(shares) == 4
    assert (shares[1:] - 1 / 3).abs().max() < 5 * math.sqrt(2 / 9 / inner.sum())
    runs = (labels[:, 1:] != -100) & (labels[:, :-1] == -100)
    assert (runs.sum(1) + (labels[:, 0] != -100) == 1).all()


def test_positions_are_selected_equally(million):
    selected = (million[2] != -100).double().mean(0)
    sigma = math.sqrt(0.3 * 0.7 / len(million[2]))
    assert (selected - selected.mean()).abs().max() < 5 * sigma
    assert abs(selected[:3].mean() - selected.mean()) < 4 * sigma
    assert abs(selected[-3:].mean() - selected.mean()) < 4 * sigma
    eighths = selected.view(8, -1).mean(1)
    spans = 7 / 3  # E[length²]/E[length]: tokens of a span are masked together, so fewer are independent
    assert (eighths - selected.mean()).abs().max() < 4 * sigma * math.sqrt(spans / (len(selected) / 8))


def test_two_rows_two_steps_or_two_seeds_never_share_a_mask(million):
    masks = million[2] != -100
    assert len(masks.unique(dim=0)) == len(masks)
    tokens = million[0][:20]
    backend = "torch" if len(masks) > 250 else "triton"
    next_step = mask(tokens, torch.arange(20) + len(masks), backend=backend)[1] != -100
    next_seed = mask(tokens, seed=2, backend=backend)[1] != -100
    for others in (next_step, next_seed):
        agree = (masks[:20] & others).double().mean() / others.double().mean()
        assert agree == pytest.approx(0.3, abs=5 * math.sqrt(0.3 * 0.7 * 7 / 3 / others.sum()))  # as often as by chance
    assert len(torch.cat([masks, next_step, next_seed]).unique(dim=0)) == len(masks) + 40
