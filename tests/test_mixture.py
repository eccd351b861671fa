"""Several corpora in one stream of rows: exact fractions, every token once per epoch, random access by row number."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptbert.data import inputs as run_inputs
from gptbert.data.hybrid_plan import HybridPlan
from gptbert.data.inputs import Inputs, corpus_names
from gptbert.data.loader import BatchLoader
from gptbert.data.micro_batch import MicroBatches
from gptbert.data.mixture import Mixture
from gptbert.data.packing import Position, RowStream
from gptbert.data.progress import Progress
from gptbert.distributed.world import World
from gptbert.errors import InputError
from gptbert.model.objective import Objective
from gptbert.text.special_tokens import BOS_ID
from tests.test_packing import FIELDS, assert_equal, lengths, seq_lengths

CPU = torch.device("cpu")
weights = st.floats(1e-3, 1e3)
corpora = st.lists(lengths, min_size=1, max_size=5)
growths = st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any)  # numbers of rows of one, two and four slots


class Sized:
    """The part of a stream's interface that a mixture uses before it requests rows."""

    def __init__(self, slots_per_epoch):
        self.slots_per_epoch = slots_per_epoch
        self.store = self
        self.num_tokens = slots_per_epoch


def sized(weights):
    return Mixture([Sized(1)] * len(weights), tuple(weights))


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([2, 1, 1], "ABACABAC"),
        ([1, 1, 2], "CACBCACB"),
        ([0.7, 0.3], "ABAAABAABA" * 2),  # 0.7 · n, rounded: 1 1 2 3 4 4 5 6 6 7
        ([1e308, 1e308], "ABAB"),
        ([5], "AAA"),
    ],
)
def test_rows_are_dealt_to_corpora_by_their_shares(weights, expected):
    dealt = np.diff(sized(weights)._dealt(np.arange(len(expected) + 1)), axis=1)
    assert "".join("ABC"[corpus] for corpus in dealt.argmax(axis=0)) == expected


@settings(max_examples=200, deadline=None)
@given(st.lists(weights, min_size=1, max_size=40), st.integers(0, 2**31) | st.integers(0, 2**50))
def test_shares_hold_after_any_number_of_rows(weights, first):
    """Each row goes to one corpus, and every corpus stays close to its fraction of the rows so far."""
    mixture, rows = sized(weights), first + np.arange(100)
    counts = mixture._dealt(rows)
    one_more = np.diff(counts, axis=1)
    assert set(one_more.ravel()) <= {0, 1}
    assert (one_more.sum(axis=0) == 1).all()
    rounding = 0.5 + 0.5 * sum(1 / number for number in range(1, len(weights)))  # its own and earlier corpora's
    units = len(weights) * rows / 2**30  # resolution of the stored fractions
    assert (np.abs(counts - rows * mixture.shares[:, None]) <= rounding + units).all()


def slots_before(mixture, slot):
    """Each corpus's slots in the rows before `slot`."""
    return mixture._before(slot)[2].tolist()


def test_without_weights_all_epochs_end_together():
    mixture = Mixture([Sized(50), Sized(1000), Sized(7)])
    assert slots_before(mixture, 1057) == [50, 1000, 7]
    assert slots_before(mixture, 10_570_000) == [500_000, 10_000_000, 70_000]


def test_a_corpus_far_below_the_others_has_a_row_now_and_then():
    assert sized([1, 1e-15])._dealt(np.array([2**30 + 1])).tolist() == [[2**30], [1]]


def make_streams(make_store, corpora, seq_length):
    return [RowStream(make_store(part), seq_length, (7, number)) for number, part in enumerate(corpora)]


def growing(counts):
    return [(0, 1), (counts[0], 2), (counts[0] + 2 * counts[1], 4)]


def all_rows(mixture, counts):
    """These numbers of rows of one, two and four slots, one call for each length."""
    starts = growing(counts)
    return [mixture.rows(slot, count, factor) for (slot, factor), count in zip(starts, counts, strict=True) if count]


@settings(max_examples=150, deadline=None)
@given(corpora, seq_lengths, growths, st.data())
def test_each_corpus_hands_out_its_own_rows_and_no_row_has_two(make_store, corpora, seq_length, counts, data):
    """Each corpus's slots come in order, without gaps or repetitions, even if rows grow at odd slots."""
    shares = data.draw(st.just(()) | st.tuples(*[weights] * len(corpora)))
    streams = make_streams(make_store, corpora, seq_length)
    mixture = Mixture(streams, shares, growing(counts))
    borders = np.cumsum([0, *map(sum, corpora)])
    slots, row_ids = np.zeros(len(corpora), int), []
    for rows in all_rows(mixture, counts):
        row_ids.extend(rows.row_ids)
        factor = (rows.tokens.shape[1] - 1) // seq_length
        assert (rows.tokens[:, 0] == BOS_ID).all()
        for row, slot in enumerate(rows.row_ids):
            grown = np.greater(slots_before(mixture, slot + factor), slots_before(mixture, slot))
            (corpus,) = np.flatnonzero(grown)
            own = streams[corpus].rows(int(slots[corpus]), 1, factor)
            np.testing.assert_array_equal(rows.tokens[row], own.tokens[0])
            np.testing.assert_array_equal(rows.document_ids[row], own.document_ids[0])
            shifted = np.where(own.positions[0] < 0, -1, own.positions[0] + borders[corpus])
            np.testing.assert_array_equal(rows.positions[row], shifted)
            slots[corpus] += factor
    assert len(set(row_ids)) == sum(counts)


@settings(max_examples=60, deadline=None)
@given(corpora, seq_lengths, st.integers(0, 3))
def test_every_token_once_an_epoch(make_store, corpora, seq_length, epoch):
    """Mixed by size, all corpora's epochs end together, after the sum of their slots, with each token seen once."""
    streams = make_streams(make_store, corpora, seq_length)
    total = sum(stream.slots_per_epoch for stream in streams)
    positions = Mixture(streams).rows(epoch * total, total).positions
    assert sorted(positions[positions >= 0]) == list(range(sum(map(sum, corpora))))


@settings(max_examples=100, deadline=None)
@given(corpora, seq_lengths, growths, st.data())
def test_rows_are_a_pure_function_of_their_number(make_store, corpora, seq_length, counts, data):
    shares = data.draw(st.tuples(*[weights] * len(corpora)))
    whole = all_rows(Mixture(make_streams(make_store, corpora, seq_length), shares, growing(counts)), counts)[-1]
    fresh = Mixture(make_streams(make_store, corpora, seq_length), shares, growing(counts))
    factor = (whole.tokens.shape[1] - 1) // seq_length
    for row in data.draw(st.permutations(range(len(whole.tokens)))):
        one = fresh.rows(int(whole.row_ids[row]), 1, factor)
        for name in FIELDS:
            np.testing.assert_array_equal(getattr(one, name)[0], getattr(whole, name)[row], err_msg=name)


@settings(max_examples=60, deadline=None)
@given(lengths, seq_lengths, growths)
def test_one_corpus_is_its_own_stream(make_store, lengths, seq_length, counts):
    (stream,) = make_streams(make_store, [lengths], seq_length)
    for rows in all_rows(Mixture([stream], (3,), growing(counts)), counts):
        factor = (rows.tokens.shape[1] - 1) // seq_length
        assert_equal(rows, stream.rows(int(rows.row_ids[0]), len(rows.tokens), factor))


def test_places_of_all_corpora_by_hand(make_store):
    """Epochs of 4 slots and of 2, of 4 tokens, rows 2 to 1, including long rows."""
    mixture = Mixture([RowStream(make_store(part), 4) for part in ((9, 5), (7,))], (2, 1), [(0, 1), (3, 2)])
    expected = [(0, 0), (1, 0), (1, 1), (2, 1), (4, 1), (4, 3), (6, 3)]
    for slot, counts in zip((0, 1, 2, 3, 5, 7, 9), expected, strict=True):
        places = [Position(count // size, 4 * (count % size)) for count, size in zip(counts, (4, 2), strict=True)]
        assert mixture.places(slot) == places
    assert [mixture.rows_before(slot) for slot in (0, 1, 2, 3, 5, 7, 9)] == [0, 1, 2, 3, 4, 5, 6]


@settings(max_examples=100, deadline=None)
@given(corpora, seq_lengths, st.lists(st.integers(1, 9), min_size=3, max_size=3), st.data())
def test_a_mixture_goes_on_where_another_stopped(make_store, corpora, seq_length, counts, data):
    """From any row on, a mixture made from the places there has the rows of the one from the beginning."""
    starts, shares = growing(counts), data.draw(st.just(()) | st.tuples(*[weights] * len(corpora)))
    whole = Mixture(make_streams(make_store, corpora, seq_length), shares, starts)
    index = data.draw(st.integers(0, 2))
    slot, factor = starts[index]
    slot += factor * data.draw(st.integers(0, counts[index] - 1))
    streams = [
        RowStream(make_store(part), seq_length, (7, number), start=place)
        for number, (part, place) in enumerate(zip(corpora, whole.places(slot), strict=True))
    ]
    growth = [(slot, factor), *starts[index + 1 :]]
    rest = Mixture(streams, shares, growth, whole.rows_before(slot))
    ends = [first for first, _ in growth[1:]] + [growth[-1][0] + 7 * growth[-1][1]]
    for (first, factor), end in zip(growth, ends, strict=True):
        count = (end - first) // factor
        assert_equal(rest.rows(first, count, factor), whole.rows(first, count, factor))
        assert rest.places(end) == whole.places(end)
        assert rest.rows_before(end) == whole.rows_before(end)


def test_rows_of_another_length_or_place_are_refused(make_store):
    mixture = Mixture(make_streams(make_store, [[9], [5]], 4), (), [(0, 1), (3, 2)])
    mixture.rows(5, 2, 2)
    for slot, factor in ((4, 2), (5, 1), (2, 2)):
        with pytest.raises(ValueError, match=f"{factor} slots begins at slot {slot}"):
            mixture.rows(slot, 1, factor)


def test_ranks_together_train_what_a_run_mixes(make_store, make_config, tiny):
    """In a growing run, three ranks together train each corpus's slots in order, none twice, for both objectives."""
    stores = tuple(make_store([length] * 9, tokens=16 + np.arange(9 * length) % 40) for length in (30, 7, 11))
    mixed = {"train_path": tuple(map(Path, "abc")), "train_weights": (1.0, 5.0, 2.0), "mask_history": True}
    growth = {"seq_length": 8, "seq_length_growth": True, "max_steps": 33, "global_batch_size": 17}
    config = make_config(**mixed, **growth, hybrid_mode="batch")
    inputs, plan = Inputs(tiny, 64, stores, stores[0]), HybridPlan(config, 3)
    assert plan.length_factors == {1: 0, 2: 24, 4: 30}
    worlds = [World(rank, 3, CPU) for rank in range(3)]
    ranks = [
        BatchLoader(config, inputs, world, MicroBatches(config, plan, world), Progress(config, inputs, plan))
        for world in worlds
    ]
    trained = {objective: [] for objective in Objective}
    for step in range(config.max_steps):
        for share, tensors in (loaded for rank in ranks for loaded in rank.load(step)):
            width = share.length_factor * config.seq_length + 1
            trained[share.objective].extend(tensors["positions"][:, 1:width].numpy())
    borders = np.cumsum([0, *(store.num_tokens for store in stores)])
    assert len(ranks[0].mask_history.counts) == borders[-1] + 1
    slots = np.zeros(3, int)
    for index, (objective, rows) in enumerate(trained.items()):
        for corpus, store in enumerate(stores):
            found = np.concatenate([row for row in rows if borders[corpus] <= row.max() < borders[corpus + 1]])
            count = len(found) // config.seq_length
            own = RowStream(store, config.seq_length, (config.seed, index, corpus)).rows(0, count).positions[:, 1:]
            np.testing.assert_array_equal(found, np.where(own < 0, -1, own + borders[corpus]).ravel())
            slots[corpus] += count
        assert sum(map(len, rows)) == plan.slots_before(objective, config.max_steps) * config.seq_length
    np.testing.assert_allclose(slots / slots.sum(), [1 / 8, 5 / 8, 2 / 8], atol=0.02)
    slots_of_epochs = [35, 9, 14]  # 9 · 31, 9 · 8 and 9 · 12 tokens with their `<s>`, in slots of 8
    epochs = ranks[0].progress.epochs_before(config.max_steps)
    assert epochs == pytest.approx(dict(zip("abc", slots / slots_of_epochs, strict=True)), abs=0.1)


def test_one_file_is_no_mixture(make_store, make_config, tiny):
    store = make_store([30] * 9, tokens=np.arange(270) % 40 + 16)
    config = make_config(train_path=(Path("a"),), train_weights=(3.0,))
    progress = Progress(config, Inputs(tiny, 64, (store,), store), HybridPlan(config, 1))
    assert {type(stream) for stream in progress.streams.values()} == {RowStream}
    assert progress.epochs_before(7) == {}


def test_names_tell_files_apart(tmp_path):
    def names(*paths):
        return corpus_names([tmp_path / path for path in paths])

    assert names("wiki.safetensors", "books.bin") == ["wiki", "books"]
    assert names("wiki.safetensors", "wiki.bin") == ["wiki.safetensors", "wiki.bin"]
    assert names("a/train.bin", "b/train.bin", "b/x.bin") == ["a/train.bin", "b/train.bin", "b/x.bin"]


def test_the_look_at_the_start_is_shared_by_the_corpora(make_store, tiny, monkeypatch):
    """Ten tokens are checked of corpora with 60 and 40: six and four."""
    monkeypatch.setattr(run_inputs, "CHECKED_TOKENS", 10)

    def check(*bad):
        stores = make_store([60]), make_store([40])
        for store, place in zip(stores, bad, strict=True):
            store.shards[0][place] = 2**20
        Inputs(tiny, 64, stores, make_store([5])).check_ids(0, 1)

    check(6, 4)
    for bad in ((5, 4), (6, 3)):
        with pytest.raises(InputError, match="--train_path: token id 1048576"):
            check(*bad)
