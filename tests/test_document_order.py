"""The two-level shuffle: every document once, random access to blocks, and memory independent of corpus size."""

import gc
from collections import Counter
from concurrent.futures import Future

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptbert.data.document_order import SIZES, DocumentOrder, ShuffleSizes
from gptbert.data.packing import RowStream

lengths = st.lists(st.integers(0, 9), min_size=1, max_size=60).filter(any)
sizes = st.builds(ShuffleSizes, st.integers(1, 6), st.integers(1, 20), st.integers(1, 12))
seq_lengths = st.integers(2, 9)


def whole_epoch(order, epoch):
    return order.between(epoch, 0, order.stream_length)


@settings(max_examples=150, deadline=None)
@given(lengths, sizes, st.integers(0, 3), st.booleans(), st.data())
def test_every_document_once_an_epoch(make_store, lengths, sizes, epoch, shuffle, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(lengths)), max_size=3)))
    store = make_store(lengths, cuts=cuts)
    order = DocumentOrder(store, (5,), shuffle, sizes)
    starts, bounds = whole_epoch(order, epoch)
    first_tokens, all_lengths = store.documents()
    filled = all_lengths > 0
    assert bounds[0] == 0
    assert bounds[-1] == order.stream_length == sum(lengths) + np.count_nonzero(lengths)
    given_documents = Counter(zip(starts.tolist(), (np.diff(bounds) - 1).tolist(), strict=True))
    assert given_documents == Counter(zip(first_tokens[filled].tolist(), all_lengths[filled].tolist(), strict=True))
    if not shuffle:
        assert starts.tolist() == first_tokens[filled].tolist()


@settings(max_examples=150, deadline=None)
@given(lengths, sizes, seq_lengths, st.integers(0, 3), st.booleans())
def test_every_token_once_an_epoch(make_store, lengths, sizes, seq_length, epoch, shuffle):
    stream = RowStream(make_store(lengths), seq_length, (7,), shuffle, sizes)
    rows = stream.rows(epoch * stream.slots_per_epoch, stream.slots_per_epoch)
    content = rows.positions >= 0
    assert sorted(rows.positions[content]) == list(range(sum(lengths)))
    assert (rows.tokens[content] == 100 + rows.positions[content]).all()


@settings(max_examples=150, deadline=None)
@given(lengths, sizes, seq_lengths, st.sampled_from([1, 2, 4]), st.data())
def test_any_row_can_be_made_from_its_number(make_store, lengths, sizes, seq_length, factor, data):
    store = make_store(lengths)
    stream = RowStream(store, seq_length, (3, 1), True, sizes)
    count = -(-3 * stream.slots_per_epoch // factor)
    whole = stream.rows(0, count, factor)
    fresh = RowStream(store, seq_length, (3, 1), True, sizes)
    for row in data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=12)):
        one = fresh.rows(row * factor, 1, factor)
        for name in ("tokens", "document_ids", "row_ids", "positions"):
            np.testing.assert_array_equal(getattr(one, name)[0], getattr(whole, name)[row], err_msg=name)


def order_before_blocks(store, seed, epoch):
    """The order of earlier versions, in which an epoch was one permutation of all documents."""
    starts, lengths = store.documents()
    documents = np.flatnonzero(lengths)
    documents = np.random.Generator(np.random.Philox(np.random.SeedSequence([*seed, epoch]))).permutation(documents)
    return starts[documents].tolist(), np.cumsum(lengths[documents] + 1).tolist()


@settings(max_examples=80, deadline=None)
@given(lengths, st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 1)), st.integers(0, 4), st.integers(1, 5))
def test_a_corpus_of_one_block_keeps_its_old_order(make_store, lengths, seed, epoch, chunk):
    store = make_store(lengths)
    for sizes in (SIZES, ShuffleSizes(chunk, len(lengths) + chunk)):
        starts, bounds = whole_epoch(DocumentOrder(store, seed, True, sizes), epoch)
        assert (starts.tolist(), bounds[1:].tolist()) == order_before_blocks(store, seed, epoch)


def test_a_million_documents_are_one_block(make_store):
    store = make_store([1] * 2**20, tokens=np.zeros(2**20))
    starts, _ = whole_epoch(DocumentOrder(store, (42, 0), True, SIZES), 1)
    assert starts.tolist() == order_before_blocks(store, (42, 0), 1)[0]


def test_chunks_and_documents_are_both_shuffled(make_store):
    store = make_store([1] * 64)
    order = DocumentOrder(store, (1,), True, ShuffleSizes(4, 16))
    blocks = []
    for epoch in (0, 1):
        starts = whole_epoch(order, epoch)[0].reshape(4, 16)
        for block in starts:
            chunks = Counter((block // 4).tolist())
            assert sorted(chunks.values()) == [4] * 4, "a block is whole chunks"
            assert max(chunks) - min(chunks) > 3, "from all over the corpus"
            assert block.tolist() != sorted(block), "whose documents are mixed"
            blocks.append(tuple(block))
    assert len(set(blocks)) == 8


def test_each_block_has_a_permutation_of_its_own(make_store):
    """Even with the same chunks: a permutation shared by the blocks of an epoch would repeat within the epoch."""
    order = DocumentOrder(make_store([1] * 64), (1,), True, ShuffleSizes(4, 16))
    permutations = set()
    for epoch in (0, 1):
        starts, _ = whole_epoch(order, epoch)
        before = (4 * order._epoch(epoch).chunks[:, None] + np.arange(4)).ravel()  # the permutation of chunks alone
        for old, new in zip(before.reshape(4, 16), starts.reshape(4, 16), strict=True):
            assert sorted(old) == sorted(new)
            permutations.add(tuple(old.tolist().index(document) for document in new))
    assert len(permutations) == 8


def held(owner):
    """Bytes of the arrays reachable from an object, without the store's files."""
    files = {id(array) for array in [*owner.store.shards, *owner.store.document_offsets]}
    seen, bytes_held, waiting = set(), 0, [owner]
    while waiting:
        item = waiting.pop()
        if id(item) in seen or id(item) in files or isinstance(item, type):
            continue
        seen.add(id(item))
        if isinstance(item, np.ndarray):
            bytes_held += item.nbytes if item.base is None else item.base.nbytes
        elif isinstance(item, Future):
            waiting.append(item.result())
        elif isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, list | tuple):
            waiting += item
        elif type(item).__module__.startswith("gptbert"):
            waiting += vars(item).values()
    return bytes_held


def test_what_is_held_does_not_grow_with_the_corpus(make_store):
    sizes = ShuffleSizes(chunk_documents=8, block_documents=128, most_chunks=64)
    figures = {}
    for documents in (2**9, 2**12, 2**14):
        stream = RowStream(make_store([3] * documents), 16, (2,), True, sizes)
        last = 3 * stream.slots_per_epoch
        figures[documents] = 0
        for slot in [*range(0, last, last // 40), last]:
            stream.rows(slot, 2)
            figures[documents] = max(figures[documents], held(stream))
    blocks, chunks = 2 * 16 * 256, (16 + 2 * 16) * 64  # a block may be one chunk of 2**14 / 64 documents
    assert figures[2**9] >= 2 * 16 * 128, "the count sees the blocks"
    assert max(figures.values()) <= blocks + chunks + 200, figures
    order = RowStream(make_store([3] * 2**14), 16).document_order
    assert order._num_blocks == 1, "so that with the usual sizes all of them would have been held"


def test_usual_sizes_bound_a_corpus_of_a_trillion_tokens():
    documents = 2 * 10**9
    chunk = max(SIZES.chunk_documents, -(-documents // SIZES.most_chunks))
    assert chunk == 7630
    assert 16 * -(-documents // chunk) <= 4.2e6
    assert SIZES.block_documents // chunk == 137


def test_the_next_block_is_ready_before_it_is_asked_for(make_store):
    order = DocumentOrder(make_store([1] * 64), (1,), True, ShuffleSizes(4, 16))
    order.between(0, 100, 102)
    assert sorted(order._blocks) == [3, 4], "also over the end of an epoch"
    order._blocks[4].result(timeout=5)
    order.between(1, 0, 1)
    assert sorted(order._blocks) == [4, 5]
    assert sorted(order._epochs) == [1, 2]


def test_streams_of_a_store_share_the_table_of_chunks(make_store):
    store = make_store([2] * 40)
    one, other = (DocumentOrder(store, (seed,), True, ShuffleSizes(4, 16)) for seed in (0, 1))
    assert one._chunk_sizes is other._chunk_sizes


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(1, 9), st.data())
def test_chunk_sizes_by_hand(make_store, lengths, chunk, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(lengths)), max_size=3)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gptbert.data.token_store.SLICE", data.draw(st.integers(1, 20)))
        sizes = make_store(lengths, cuts=cuts).chunk_sizes(chunk)
    chunks = [lengths[first : first + chunk] for first in range(0, len(lengths), chunk)]
    assert sizes.tolist() == [[sum(part), np.count_nonzero(part)] for part in chunks]


def test_a_stream_that_is_dropped_ends_with_its_thread(make_store):
    stream = RowStream(make_store([3] * 9), 4)
    stream.rows(0, 1)
    (thread,) = stream.document_order._worker._threads
    del stream
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()
