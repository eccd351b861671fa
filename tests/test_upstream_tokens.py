"""Upstream's token files: read correctly, and never executed."""

import itertools
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptbert.data.token_store import TokenStore
from gptbert.data.upstream_tokens import read_token_file
from gptbert.errors import InputError


def write(path, documents):
    torch.save(documents, path)
    return path


def read(path):
    tokens, offsets = read_token_file(path)
    return [tokens[start:end].tolist() for start, end in itertools.pairwise(offsets)]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 65535), max_size=6), max_size=5),
    st.sampled_from([torch.int16, torch.uint16, torch.int32, torch.int64]),
)
def test_documents_come_back_without_their_leading_s(documents, dtype):
    arrays = [np.array(document, dtype=np.uint16) for document in documents]
    tensors = [torch.from_numpy(array.view(np.int16)) if dtype == torch.int16 else torch.from_numpy(array).to(dtype)
               for array in arrays]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        documents_read = read(write(Path(folder, "t.bin"), tensors))
    assert documents_read == [document[1:] if document[:1] == [1] else document for document in documents]


def test_int16_that_wrapped_is_read_as_it_was_meant(tmp_path):
    path = write(tmp_path / "t.bin", [torch.tensor([1, -32768, -1, 32767], dtype=torch.int16)])
    assert read(path) == [[32768, 65535, 32767]]
    store = TokenStore.open(path)
    assert (store.vocab_size, store.num_tokens, store.tokenizer_hash) == (65536, 3, None)


def test_only_the_first_s_is_dropped(tmp_path):
    path = write(tmp_path / "t.bin", [torch.tensor([1, 1, 7, 1]), torch.tensor([1]), torch.tensor([7, 1])])
    assert read(path) == [[1, 7, 1], [], [7, 1]]


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", ["zip", "legacy", "pickle"])
def test_code_in_a_token_file_is_refused_and_not_run(tmp_path, protocol):
    path, proof = tmp_path / "t.bin", tmp_path / "executed"
    content = [torch.tensor([1, 2]), Malicious(proof)]
    if protocol == "pickle":
        path.write_bytes(pickle.dumps(Malicious(proof)))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=protocol == "zip")
    pickle.loads(pickle.dumps(Malicious(proof)))
    assert proof.exists()  # the payload works
    proof.unlink()
    with pytest.raises(InputError, match=r"t\.bin: refused") as error:
        read_token_file(path)
    assert not proof.exists()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"hello\n", b"{}", b"\x80\x02.", b"PK\x03\x04", b"PK\x05\x06" + bytes(18)]
)
def test_other_files_are_one_line(tmp_path, content):
    (tmp_path / "t.bin").write_bytes(content)
    with pytest.raises(InputError, match=r"t\.bin") as error:
        read_token_file(tmp_path / "t.bin")
    assert "\n" not in str(error.value)


def test_a_text_is_called_one(tmp_path):
    (tmp_path / "t.jsonl").write_text('"Ein Wörterbuch"\n')
    with pytest.raises(InputError, match=r"t.jsonl: is text; tokenize_scripts/tokenize_corpus.py makes tokens of it"):
        read_token_file(tmp_path / "t.jsonl")


def test_a_missing_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="none"):
        read_token_file(tmp_path / "none.bin")


@pytest.mark.parametrize(
    "content",
    [
        {"a": torch.arange(3)}, torch.arange(3), [torch.arange(4).view(2, 2)], [torch.rand(3)], [[1, 2, 3]], [1, 2],
        None, (torch.arange(3),), [torch.tensor(3)], [torch.tensor([True])], ["text"], [torch.arange(3), None],
        [torch.tensor([-1])], [torch.tensor([2**32 + 5])], [torch.arange(3).to_sparse()],
    ],
)  # fmt: skip
def test_other_objects_are_refused(tmp_path, content):
    with pytest.raises(InputError, match=r"t\.bin") as error:
        read_token_file(write(tmp_path / "t.bin", content))
    assert "\n" not in str(error.value)


def test_an_empty_list_holds_no_documents(tmp_path):
    path = write(tmp_path / "t.bin", [])
    tokens, offsets = read_token_file(path)
    assert (tokens.tolist(), offsets.tolist()) == ([], [0])
    with pytest.raises(InputError, match="holds no tokens"):
        TokenStore.open(path)
