"""Published parameter names both ways, and upstream's token files: read as meant, and never run."""

import itertools
import json
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import safe_open

from gptbert.config import ModelConfig
from gptbert.errors import InputError
from gptbert.model import GPTBert
from gptbert.token_store import TokenStore
from gptbert.upstream import from_upstream, to_upstream
from gptbert.upstream_tokens import read_token_file

GOLDEN = Path(__file__).parent / "golden"
TIED = "classifier.nonlinearity.5.weight"


def golden(name):
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        config = ModelConfig(**json.loads(file.metadata()["config"]))
        params = {key.removeprefix("param."): file.get_tensor(key) for key in file.keys() if key.startswith("param.")}  # noqa: SIM118
        return config, params, file.get_tensor("position_indices")


@pytest.mark.parametrize("name", ["model_a", "model_b"])
def test_names_and_buffers_are_exactly_the_published_ones(name):
    config, params, position_indices = golden(name)
    model = GPTBert(config)
    published = to_upstream(model.state_dict())
    assert set(published) == {*params, TIED}
    assert {key: tensor.shape for key, tensor in published.items() if key != TIED} == {
        key: tensor.shape for key, tensor in params.items()
    }
    assert published[TIED] is published["embedding.word_embedding.weight"]
    complete = to_upstream(model.state_dict(), config)
    buffers = {f"transformer.attention_layers.{i}.position_indices" for i in range(config.num_hidden_layers)}
    assert set(complete) == {*params, TIED, *buffers}
    for buffer in buffers:
        assert complete[buffer].dtype == position_indices.dtype
        assert torch.equal(complete[buffer], position_indices)


@pytest.mark.parametrize("name", ["model_a", "model_b"])
def test_published_weights_go_in_and_come_out_again(name):
    config, params, position_indices = golden(name)
    published = {**params, TIED: params["embedding.word_embedding.weight"]}
    for layer in range(config.num_hidden_layers):
        published[f"transformer.attention_layers.{layer}.position_indices"] = position_indices
    model = GPTBert(config)
    model.load_state_dict(from_upstream(published), strict=True)
    back = to_upstream(model.state_dict(), config)
    assert set(back) == set(published)
    assert all(torch.equal(back[key], published[key]) for key in published)
    assert list(from_upstream(back)) == list(model.state_dict())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_dropped(tiny, prefix):
    state = GPTBert(tiny).state_dict()
    wrapped = {prefix + key: tensor for key, tensor in to_upstream(state, tiny).items()}
    assert set(from_upstream(wrapped)) == set(state)


@pytest.mark.parametrize(
    "name",
    [
        "classifier.nonlinearity.2.weight",
        "transformer.attention_layers.0.in_proj_qk",
        "transformer.attention_layers.x.in_proj_qk.weight",
        "transformer.dwa_modules.alphas.one",
        "transformer.mlp_layers.0.mlp.2.weight",
        "blocks.0.attention.query_key.weight",
        "embedding.word_embedding.weight.extra",
        "",
    ],
)
def test_unknown_names_are_errors(tiny, name):
    state = to_upstream(GPTBert(tiny).state_dict())
    with pytest.raises(InputError, match=f"^{name} is no parameter"):
        from_upstream({**state, name: torch.zeros(1)})
    if not name.startswith("blocks."):
        with pytest.raises(InputError, match=f"^{name} is no parameter"):
            to_upstream({**GPTBert(tiny).state_dict(), name: torch.zeros(1)})


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
    assert proof.exists()  # the trap works
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
