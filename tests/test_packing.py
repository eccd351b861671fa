"""Rows: every token once per epoch, documents that never mix, and a pure function of the row number."""

import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptbert.data.packing import RowStream
from gptbert.data.prefetcher import Prefetcher
from gptbert.text.special_tokens import BOS_ID, PAD_ID

lengths = st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any)
seq_lengths = st.integers(2, 17)
FIELDS = ("tokens", "document_ids", "row_ids", "positions")


def document_of_position(store):
    return np.repeat(np.arange(store.num_documents), store.documents()[1])


def assert_equal(rows, expected):
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(rows, name), getattr(expected, name), err_msg=name)


def test_the_example_of_the_module_text(make_store):
    stream = RowStream(make_store([5, 2, 4]), 4, shuffle=False)
    rows = stream.rows(0, 4)
    s, p = BOS_ID, PAD_ID
    assert stream.slots_per_epoch == 4
    assert rows.tokens.tolist() == [
        [s, 100, 101, 102, 103],
        [s, 104, s, 105, 106],
        [s, s, 107, 108, 109],
        [s, 110, p, p, s],
    ]
    assert rows.document_ids.tolist() == [[0] * 5, [0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [0, 0, -1, -1, 1]]
    assert rows.positions.tolist() == [[-1, 0, 1, 2, 3], [-1, 4, -1, 5, 6], [-1, -1, 7, 8, 9], [-1, 10, -1, -1, -1]]
    assert rows.row_ids.tolist() == [0, 1, 2, 3]


@settings(max_examples=120, deadline=None)
@given(lengths, seq_lengths, st.integers(0, 2), st.booleans())
def test_an_epoch_has_every_token_once_and_in_order(make_store, lengths, seq_length, epoch, shuffle):
    store = make_store(lengths)
    stream = RowStream(store, seq_length, (7,), shuffle)
    per_epoch = stream.slots_per_epoch
    rows = stream.rows(epoch * per_epoch, per_epoch)
    assert rows.tokens.shape == (per_epoch, seq_length + 1)
    content = rows.positions >= 0
    positions = rows.positions[content]
    assert sorted(positions) == list(range(sum(lengths)))
    assert (rows.tokens[content] == 100 + positions).all()
    document = document_of_position(store)[positions]
    steps, same = np.diff(positions), np.diff(document) == 0
    assert (steps[same] == 1).all()  # tokens of a document are consecutive
    assert (~same).sum() == np.count_nonzero(lengths) - 1  # and no document is split


@settings(max_examples=120, deadline=None)
@given(lengths, seq_lengths, st.integers(0, 3), st.sampled_from([1, 2, 4]))
def test_pieces_are_led_by_s_and_never_mix_documents(make_store, lengths, seq_length, first_epoch, factor):
    store = make_store(lengths)
    stream = RowStream(store, seq_length, (1,))
    count = -(-2 * stream.slots_per_epoch // factor)
    rows = stream.rows(first_epoch * stream.slots_per_epoch, count, factor)
    inserted = rows.positions < 0
    starts = inserted & (rows.tokens == BOS_ID)
    padding = inserted & (rows.tokens == PAD_ID)
    assert (inserted == starts | padding).all()
    assert starts[:, 0].all()
    assert (rows.document_ids[padding] == -1).all()
    assert (rows.document_ids[~padding] >= 0).all()
    document = document_of_position(store)
    for row in range(count):
        seen = -1
        owner = None
        for column in range(rows.tokens.shape[1]):
            if padding[row, column]:
                continue
            if starts[row, column]:
                seen, owner = seen + 1, None
            else:
                here = document[rows.positions[row, column]]
                assert owner in {None, here}
                owner = here
            assert rows.document_ids[row, column] == seen


@settings(max_examples=80, deadline=None)
@given(lengths, seq_lengths)
def test_padding_is_only_in_an_epochs_last_row(make_store, lengths, seq_length):
    stream = RowStream(make_store(lengths), seq_length)
    rows = stream.rows(0, 3 * stream.slots_per_epoch)
    padded = (rows.document_ids < 0).any(axis=1)
    last = (np.arange(len(padded)) + 1) % stream.slots_per_epoch == 0
    assert not padded[~last].any()
    fill = -(sum(lengths) + np.count_nonzero(lengths)) % seq_length
    assert ((rows.document_ids < 0).sum(axis=1)[last] == fill).all()
    assert (rows.tokens[last, -1] == BOS_ID).all()  # the next epoch's first document starts with it


@settings(max_examples=120, deadline=None)
@given(st.data(), lengths, seq_lengths, st.sampled_from([1, 2, 4]))
def test_rows_are_a_pure_function_of_their_number(make_store, data, lengths, seq_length, factor):
    store = make_store(lengths)
    stream = RowStream(store, seq_length, (3, 1))
    first = data.draw(st.integers(0, 4 * stream.slots_per_epoch), label="first slot")
    count = data.draw(st.integers(1, 12), label="rows")
    whole = stream.rows(first, count, factor)
    order = data.draw(st.permutations(range(count)))
    fresh = RowStream(store, seq_length, (3, 1))
    for row in order:
        one = fresh.rows(first + row * factor, 1, factor)
        for name in FIELDS:
            np.testing.assert_array_equal(getattr(one, name)[0], getattr(whole, name)[row], err_msg=name)


@settings(max_examples=60, deadline=None)
@given(lengths, seq_lengths, st.integers(0, 20), st.sampled_from([2, 4]))
def test_longer_rows_are_the_same_stream(make_store, lengths, seq_length, first, factor):
    stream = RowStream(make_store(lengths), seq_length, (5,))
    long, short = stream.rows(first, 3, factor), stream.rows(first, 3 * factor)
    np.testing.assert_array_equal(long.tokens[:, 1:].ravel(), short.tokens[:, 1:].ravel())
    np.testing.assert_array_equal(long.positions[:, 1:].ravel(), short.positions[:, 1:].ravel())
    np.testing.assert_array_equal(long.row_ids, short.row_ids[::factor])


def order_of(store, epoch=0, **options):
    stream = RowStream(store, 8, **options)
    positions = stream.rows(epoch * stream.slots_per_epoch, stream.slots_per_epoch).positions
    return positions[positions >= 0].tolist()


def test_epochs_seeds_and_objectives_shuffle_differently(make_store):
    store = make_store([3] * 50)
    orders = [order_of(store, epoch, seed=seed) for seed in ((42, 0), (42, 1), (43, 0), (0, 42)) for epoch in (0, 1, 2)]
    assert len({tuple(order) for order in orders}) == len(orders)
    assert order_of(store, 2, seed=(42, 0)) == orders[2]
    assert order_of(store, 1, shuffle=False) == list(range(150))


def test_a_shuffle_is_a_fair_one(make_store):
    """Each document comes first about equally often."""
    stream = RowStream(make_store([7] * 5), 8, (9,))
    first = [stream.rows(epoch * stream.slots_per_epoch, 1).positions[0, 1] // 7 for epoch in range(500)]
    assert np.bincount(first, minlength=5).min() > 60


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), seq_lengths, st.data())
def test_empty_documents_leave_no_trace(make_store, lengths, seq_length, data):
    gaps = data.draw(st.lists(st.integers(0, 3), min_size=len(lengths), max_size=len(lengths)))
    with_empty = [length for gap, real in zip(gaps, lengths, strict=True) for length in [0] * gap + [real]] + [0]
    sparse = RowStream(make_store(with_empty), seq_length, shuffle=False)
    dense = RowStream(make_store(lengths), seq_length, shuffle=False)
    assert sparse.slots_per_epoch == dense.slots_per_epoch
    assert_equal(sparse.rows(0, sparse.slots_per_epoch), dense.rows(0, dense.slots_per_epoch))


@settings(max_examples=80, deadline=None)
@given(lengths, seq_lengths, st.integers(0, 20), st.data())
def test_shards_make_no_difference(make_store, lengths, seq_length, first, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(lengths)), max_size=4)))
    one, many = make_store(lengths), make_store(lengths, cuts=cuts)
    assert len(many.shards) == len(cuts) + 1
    assert_equal(RowStream(many, seq_length).rows(first, 9, 2), RowStream(one, seq_length).rows(first, 9, 2))


def test_special_ids_inside_documents_do_not_look_like_structure(make_store):
    tokens = [BOS_ID, PAD_ID, 50, PAD_ID, BOS_ID, 51, PAD_ID]
    rows = RowStream(make_store([4, 3], tokens=tokens), 5, shuffle=False).rows(0, 2)
    assert rows.tokens.tolist() == [[BOS_ID, *tokens[:4], BOS_ID], [BOS_ID, *tokens[4:], PAD_ID, BOS_ID]]
    assert rows.document_ids.tolist() == [[0, 0, 0, 0, 0, 1], [0, 0, 0, 0, -1, 1]]


def test_rows_are_signed_64_bit_whatever_the_store_holds(make_store):
    rows = RowStream(make_store([40]), 8).rows(0, 3)
    assert {getattr(rows, name).dtype for name in FIELDS} == {np.dtype(np.int64)}


def test_prefetcher_gives_every_value_also_out_of_order():
    calls = []
    with Prefetcher(lambda step: calls.append(step) or step * step, 3, 10) as prefetcher:
        assert [prefetcher.get(step) for step in (3, 4, 5)] == [9, 16, 25]
        assert [prefetcher.get(step) for step in (9, 6, 3)] == [81, 36, 9]
    assert max(calls) == 9
    assert calls[:3] == [3, 4, 5]


def test_prefetcher_works_ahead_but_not_past_the_end():
    started, free = [], threading.Event()

    def compute(step):
        started.append(step)
        if step == 2:
            free.set()
        return step

    with Prefetcher(compute, 0, 3, depth=8) as prefetcher:
        assert free.wait(5)  # step 2 is computed before it is requested
        assert prefetcher.get(0) == 0
    assert started == [0, 1, 2]


def test_prefetcher_raises_what_the_function_raised():
    def fail(step):
        if step == 1:
            raise OSError("disk gone")
        return step

    with Prefetcher(fail, 0, 5) as prefetcher:
        assert prefetcher.get(0) == 0
        with pytest.raises(OSError, match="disk gone"):
            prefetcher.get(1)
        assert prefetcher.get(2) == 2


def test_prefetcher_ends_its_thread_and_drops_what_is_pending():
    done = []

    def slow(step):
        time.sleep(0.02)
        done.append(step)

    before = set(threading.enumerate())
    with Prefetcher(slow, 0, 1000, depth=1000):
        time.sleep(0.05)
    assert len(done) < 20
    assert not {thread for thread in threading.enumerate() if thread.name.startswith("rows")} - before
