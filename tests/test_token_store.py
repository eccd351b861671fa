"""The token store: a lossless round trip through any number of shards; unusable files are refused by name."""

import os
import re
import shutil
import tempfile
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from gptbert.data import token_shards, token_store
from gptbert.data.token_shards import FORMAT
from gptbert.data.token_store import TokenStore, TokenStoreWriter, token_dtype
from gptbert.errors import InputError

DOCUMENTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13], [], [14, 15]]


def write(path, documents=DOCUMENTS, *, vocab_size=16, digest="abc", batches=1, **options):
    with TokenStoreWriter(path, vocab_size, digest, **options) as writer:
        for part in np.array_split(np.arange(len(documents)), batches):
            chosen = [documents[i] for i in part]
            lengths = np.array([len(document) for document in chosen], dtype=np.int64)
            writer.append(np.fromiter(chain(*chosen), np.uint32), lengths)
    return writer


def read(store):
    documents = []
    for start, length in zip(*store.documents(), strict=True):
        tokens, positions = store.gather(np.array([start]), np.array([length]))
        assert positions.tolist() == list(range(start, start + length))
        documents.append(tokens.tolist())
    return documents


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [(1, "uint8"), (256, "uint8"), (257, "uint16"), (32768, "uint16"), (65536, "uint16"), (65537, "uint32")],
)
def test_dtype_is_the_smallest_that_holds_every_id(tmp_path, vocab_size, dtype):
    assert token_dtype(vocab_size) == dtype
    write(tmp_path / "t.safetensors", [[0, vocab_size - 1]], vocab_size=vocab_size)
    store = TokenStore.open(tmp_path / "t.safetensors")
    assert store.shards[0].dtype == dtype
    assert read(store) == [[0, vocab_size - 1]]


def test_round_trip_keeps_documents_and_metadata(tmp_path):
    writer = write(tmp_path / "t.safetensors")
    store = TokenStore.open(tmp_path / "t.safetensors")
    assert read(store) == DOCUMENTS
    assert (store.num_documents, store.num_tokens, store.vocab_size, store.tokenizer_hash) == (5, 11, 16, "abc")
    assert (writer.num_documents, writer.num_tokens, writer.files) == (5, 11, [tmp_path / "t.safetensors"])
    assert [file.name for file in tmp_path.iterdir()] == ["t.safetensors"]


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 299), max_size=9), min_size=1, max_size=12).filter(any),
    shard_tokens=st.integers(1, 20),
    batches=st.integers(1, 5),
    data=st.data(),
)
def test_any_shards_hold_the_same_documents(documents, shard_tokens, batches, data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "t.safetensors")
        writer = write(path, documents, vocab_size=300, batches=batches, shard_tokens=shard_tokens)
        store = TokenStore.open(path)
        assert read(store) == documents
        for file in writer.files:
            lengths = np.diff(load_file(file)["document_offsets"])
            assert lengths.sum() <= shard_tokens or np.count_nonzero(lengths) == 1

        flat = np.fromiter(chain(*documents), np.int64)
        pieces = data.draw(st.lists(st.integers(0, len(documents) - 1), max_size=8))
        starts, lengths = (values[pieces] for values in store.documents())
        starts, lengths = starts + lengths // 3, lengths - lengths // 3
        tokens, positions = store.gather(starts, lengths)
        naive = [
            position for start, length in zip(starts, lengths, strict=True) for position in range(start, start + length)
        ]
        assert positions.tolist() == naive
        assert tokens.tolist() == flat[naive].tolist()
        assert tokens.dtype == token_dtype(300)


def test_shards_do_not_depend_on_the_batches(tmp_path):
    for batches in (1, 5):
        write(tmp_path / f"{batches}" / "t.safetensors", shard_tokens=4, batches=batches)
    for file in (tmp_path / "1").iterdir():
        one, other = load_file(file), load_file(tmp_path / "5" / file.name)
        assert one["tokens"].tolist() == other["tokens"].tolist()
        assert one["document_offsets"].tolist() == other["document_offsets"].tolist()


def test_a_kill_among_the_renames_leaves_no_mixture_of_two_corpora(tmp_path, monkeypatch):
    path = tmp_path / "tokens.safetensors"
    write(path, shard_tokens=3)
    rename, renamed = Path.replace, []

    def killed(file, name):
        if len(renamed) == 2:
            raise KeyboardInterrupt
        renamed.append(name)
        return rename(file, name)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write(path, [[1] * len(document) for document in DOCUMENTS], shard_tokens=3)
    with pytest.raises(InputError, match=r"its shard tokens-00001-of-\d+\.safetensors is missing"):
        TokenStore.open(path)


def test_new_output_replaces_every_file_of_the_old_one(tmp_path):
    path = tmp_path / "t.safetensors"
    write(path, shard_tokens=3)
    assert len(list(tmp_path.iterdir())) == 4
    write(path, [[1, 2]])
    assert list(tmp_path.iterdir()) == [path]
    write(path, [[1, 2], [3, 4]], shard_tokens=2)
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"t-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert read(TokenStore.open(path)) == [[1, 2], [3, 4]]


def interrupted_write(path):
    with TokenStoreWriter(path, 16, "new", shard_tokens=1) as writer:
        writer.append(np.array([1, 2, 3]), np.array([1, 1, 1]))
        assert len(list(path.parent.iterdir())) == 3, (
            "the old output, the owner's file and a folder: shards are written while documents come in"
        )
        raise KeyboardInterrupt


def test_failure_leaves_the_old_output_and_nothing_else(tmp_path):
    path = tmp_path / "t.safetensors"
    write(path)
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        interrupted_write(path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


def test_failure_leaves_no_new_folder(tmp_path):
    with pytest.raises(RuntimeError), TokenStoreWriter(tmp_path / "a" / "b" / "t.safetensors", 16, "abc"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_writer_refuses_what_it_cannot_store(tmp_path, monkeypatch):
    path = tmp_path / "t.safetensors"
    with pytest.raises(InputError, match="holds no text"):
        write(path, [[]])
    with pytest.raises(InputError, match="outside the vocabulary of 16"):
        write(path, [[3, 16]])
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/t.safetensors: cannot be written \(Not a directory\)"):
        write(tmp_path / "file" / "t.safetensors")
    with pytest.raises(InputError, match="is a folder"):
        write(tmp_path)

    def full(*arguments, **options):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(token_shards, "save_file", full)
    with pytest.raises(InputError, match=r"t.safetensors: cannot be written \(.*No space left"):
        write(path)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_missing_and_empty_files_are_named(tmp_path):
    path = tmp_path / "t.safetensors"
    with pytest.raises(InputError, match=rf"{re.escape(str(path))}: no such file"):
        TokenStore.open(path)
    with pytest.raises(InputError, match="no such file"):
        TokenStore.open(tmp_path / "no" / "folder.safetensors")
    with pytest.raises(InputError, match="is a folder"):
        TokenStore.open(tmp_path)
    path.touch()
    with pytest.raises(InputError, match="file is empty"):
        TokenStore.open(path)


@pytest.mark.parametrize("kept", [9, 40, 200, -1])
def test_truncated_file_is_refused(tmp_path, kept):
    path = tmp_path / "t.safetensors"
    write(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match="damaged or cut short"):
        TokenStore.open(path)


def test_foreign_and_inconsistent_safetensors_are_refused(tmp_path):
    path = tmp_path / "t.safetensors"
    save_file({"weight": np.zeros(3)}, path)
    with pytest.raises(InputError, match="not written by"):
        TokenStore.open(path)
    metadata = {"format": FORMAT, "vocab_size": "16", "tokenizer_hash": "abc"}
    for offsets in ([0, 2], [1, 3], [0, 4], [0, 3, 2, 3], []):
        arrays = {"tokens": np.arange(3, dtype=np.uint8), "document_offsets": np.array(offsets, dtype=np.int64)}
        save_file(arrays, path, metadata=metadata)
        with pytest.raises(InputError, match="offsets do not fit"):
            TokenStore.open(path)
    empty = {"tokens": np.zeros(0, dtype=np.uint8), "document_offsets": np.zeros(1, dtype=np.int64)}
    save_file(empty, path, metadata=metadata)
    with pytest.raises(InputError, match="holds no tokens"):
        TokenStore.open(path)


@pytest.mark.parametrize(
    ("tokens", "offsets"),
    [
        (np.zeros((3, 1), np.uint8), [0, 3]),
        (np.zeros(3, np.int64), [0, 3]),
        (np.zeros(3, np.float32), [0, 3]),
        (np.zeros(3, np.uint8), [[0, 3]]),
        (np.zeros(3, np.uint8), np.array([0, 3], np.int32)),
    ],
)
def test_each_array_has_its_type_and_one_dimension(tmp_path, tokens, offsets):
    metadata = {"format": FORMAT, "vocab_size": "16", "tokenizer_hash": "abc"}
    arrays = {"tokens": tokens, "document_offsets": np.asarray(offsets)}
    save_file(arrays, tmp_path / "t.safetensors", metadata=metadata)
    with pytest.raises(InputError, match="its arrays have unexpected types"):
        TokenStore.open(tmp_path / "t.safetensors")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 20), max_size=12), st.integers(1, 5))
def test_offsets_fit_as_a_whole_whatever_the_slices(inner, size):
    offsets = np.array([0, *inner, 20])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_shards, "SLICE", size)
        assert token_shards._fits(offsets, 20) == (sorted(offsets) == offsets.tolist())
        assert not token_shards._fits(offsets, 21)


def test_of_many_shards_only_the_last_ones_stay_mapped(tmp_path, monkeypatch):
    path, opened = tmp_path / "t.safetensors", []
    documents = [[number, number + 1] for number in range(12)]
    write(path, documents, shard_tokens=2)
    open_shard = token_store.open_shard
    monkeypatch.setattr(token_store, "open_shard", lambda file: opened.append(file.name[2:7]) or open_shard(file))
    monkeypatch.setattr(token_store, "MOST_MAPPED", 3)
    store = TokenStore.open(path)
    assert opened == [f"{number:05d}" for number in range(1, 13)]
    assert (store.num_tokens, store.num_documents, len(opened)) == (24, 12, 12), "sizes open nothing"
    assert read(store) == documents
    gathered, _ = store.gather(np.array([22, 0, 20]), np.array([2, 2, 1]))
    assert gathered.tolist() == [11, 12, 0, 1, 10]
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert maps.read_text().count(str(tmp_path)) == 3
    opened.clear()
    store.gather(np.array([22, 0, 20]), np.array([2, 2, 1]))
    assert not opened


@pytest.mark.parametrize("shard_tokens", [3, 100])
def test_a_file_that_is_written_anew_in_its_place_is_refused(tmp_path, shard_tokens):
    """As cp does it: its mapping would end the process (SIGBUS), or give other text."""
    path = tmp_path / "t.safetensors"
    write(path, shard_tokens=shard_tokens)
    store = TokenStore.open(path)
    write(path, [[1, 2]], shard_tokens=shard_tokens)
    assert read(store) == DOCUMENTS, "a file that replaces it changes nothing"
    store = TokenStore.open(path)
    with path.open("r+b") as file:
        file.truncate(9)
    with pytest.raises(
        InputError, match=r"t.safetensors: has 9 bytes, and had [\d,]+ when it was opened; something has"
    ):
        read(store)


@pytest.mark.parametrize("how", ["our own command", "touched after a copy of the same size"])
def test_of_many_files_one_that_was_replaced_is_not_opened_again(tmp_path, monkeypatch, how):
    """Those read last are still mapped; others would give other text, under the old file's documents."""
    path, documents = tmp_path / "t.safetensors", [[number, number + 1] for number in range(5)]
    monkeypatch.setattr(token_store, "MOST_MAPPED", 3)
    write(path, documents, shard_tokens=2)
    store = TokenStore.open(path)
    assert read(store) == documents
    if how == "our own command":
        write(path, [[9, 9]] * 5, shard_tokens=2)
    else:
        first = tmp_path / "t-00001-of-00005.safetensors"
        first.write_bytes(first.read_bytes())
    assert store.gather(np.array([8]), np.array([2]))[0].tolist() == documents[4], "is mapped"
    with pytest.raises(InputError, match=r"t-00001-of-00005\.safetensors: is another file than the one that was"):
        store.gather(np.array([0]), np.array([2]))


def test_a_file_that_is_copied_over_by_one_of_its_size_is_refused(tmp_path):
    path, other = tmp_path / "t.safetensors", tmp_path / "other.safetensors"
    write(path)
    write(other, [[number - 1 for number in document] for document in DOCUMENTS])
    assert path.stat().st_size == other.stat().st_size
    os.utime(path, (1, 1))  # clocks of file systems tick coarsely
    store = TokenStore.open(path)
    path.chmod(0o600)
    (tmp_path / "link.safetensors").hardlink_to(path)
    assert read(store) == DOCUMENTS, "only its content counts"
    shutil.copyfile(other, path)
    with pytest.raises(
        InputError, match=r"t.safetensors: has another time of change than when it was opened; something has written"
    ):
        read(store)


def test_incomplete_and_mixed_shards_are_refused(tmp_path):
    path = tmp_path / "t.safetensors"
    second = tmp_path / "t-00002-of-00004.safetensors"
    write(path, shard_tokens=3)
    content = second.read_bytes()
    second.unlink()
    with pytest.raises(InputError, match=r"shard t-00002-of-00004\.safetensors is missing"):
        TokenStore.open(path)
    write(tmp_path / "other.safetensors", digest="other")
    (tmp_path / "other.safetensors").rename(second)
    with pytest.raises(InputError, match="different tokenizers"):
        TokenStore.open(path)
    second.write_bytes(content)
    assert read(TokenStore.open(path)) == DOCUMENTS
    (tmp_path / "t-00001-of-00009.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="two different runs"):
        TokenStore.open(path)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to read the resident memory")
@pytest.mark.parametrize("count", [99_999, 100_000])
def test_sets_of_any_number_of_shards_are_found_in_order(tmp_path, count):
    """Numbers of 100,000 and more have six digits; only some of the files are there, since that takes seconds."""
    path = tmp_path / "t.safetensors"
    numbers = [1, 2, 10, 9_999, 10_000, 10_001, 99_998, 99_999, *([100_000] if count == 100_000 else [])]
    files = [token_shards.shard_name(path, number, count) for number in numbers]
    for file in reversed(files):
        file.touch()
    assert token_shards.numbered_shards(path) == files


def test_opening_maps_the_file_and_reads_only_what_is_asked_for(tmp_path):
    size = 64 << 20
    path = tmp_path / "t.safetensors"
    with TokenStoreWriter(path, 256, "abc", shard_tokens=2 * size) as writer:
        writer.append(np.full(size, 7, dtype=np.uint8), np.array([size]))
    TokenStore.open(path)  # trigger lazy imports first
    before = _resident_bytes()
    store = TokenStore.open(path)
    tokens, _ = store.gather(np.array([size // 2]), np.array([1000]))
    grown = _resident_bytes() - before
    assert tokens.tolist() == [7] * 1000
    assert grown < size // 4
    assert store.shards[0].sum(dtype=np.int64) == 7 * size
    assert _resident_bytes() - before > size // 2, "the measurement above would have seen a file read as a whole"


def _resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


# Words


def test_every_shard_has_its_own_words(tmp_path):
    lengths, words = np.array([3, 3, 3, 3]), np.array([2, 0, 5, 1])
    with TokenStoreWriter(tmp_path / "t.safetensors", 16, "abc", shard_tokens=7) as writer:
        writer.append(np.full(12, 5), lengths, words)
    assert writer.num_words == 8
    assert [token_shards.open_shard(file).num_words for file in writer.files] == [2, 6]
    assert TokenStore.open(tmp_path / "t.safetensors").num_words == 8


def test_words_are_unknown_where_a_shard_lacks_them(tmp_path):
    with TokenStoreWriter(tmp_path / "t.safetensors", 16, "abc", shard_tokens=4) as writer:
        writer.append(np.full(4, 5), np.array([4]), np.array([3]))
        writer.append(np.full(4, 5), np.array([4]))
    assert writer.num_words is None
    assert [token_shards.open_shard(file).num_words for file in writer.files] == [3, None]
    assert TokenStore.open(tmp_path / "t.safetensors").num_words is None


@pytest.mark.parametrize("words", ["", "-1", "many", "1.5", "9" * 19, "٣"])
def test_a_number_of_words_that_is_none_is_refused(tmp_path, words):
    arrays = {"tokens": np.array([1], np.uint8), "document_offsets": np.array([0, 1])}
    metadata = {"format": FORMAT, "vocab_size": "16", "tokenizer_hash": "abc", "num_words": words}
    save_file(arrays, tmp_path / "t.safetensors", metadata=metadata)
    with pytest.raises(InputError, match="its num_words is"):
        TokenStore.open(tmp_path / "t.safetensors")


def test_the_same_documents_give_the_same_bytes(tmp_path):
    files = [write(tmp_path / f"{i}.safetensors").files[0].read_bytes() for i in range(8)]
    assert len(set(files)) == 1, "metadata stand in one order"
