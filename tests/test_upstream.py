"""Published parameter names, in both directions."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import safe_open

from gptbert.config import ModelConfig
from gptbert.errors import InputError
from gptbert.model import GPTBert
from gptbert.upstream import from_upstream, to_upstream

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


def test_a_buffer_whose_farthest_pair_upstream_rounded_out_of_range_is_taken(tiny):
    config = dataclasses.replace(tiny, position_bucket_size=8, max_position_embeddings=384)
    state = to_upstream(GPTBert(config).state_dict(), config)
    buffer = state["transformer.attention_layers.0.position_indices"]
    buffer[0, -1], buffer[-1, 0] = -1, 15  # as upstream's code makes them, of 15 vectors
    assert from_upstream(state, config)
    buffer[0, 0] += 1
    with pytest.raises(InputError, match="position_indices differs"):
        from_upstream(state, config)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_dropped(tiny, prefix):
    state = GPTBert(tiny).state_dict()
    wrapped = {prefix + key: tensor for key, tensor in to_upstream(state, tiny).items()}
    assert set(from_upstream(wrapped)) == set(state)


def test_a_buffer_is_compared_within_the_memory_that_it_has(tiny):
    """Not with terabytes, where a config has another length."""
    state = to_upstream(GPTBert(tiny).state_dict(), tiny)
    assert from_upstream(state, tiny)
    for number in (2**20, tiny.max_position_embeddings + 1):
        config = dataclasses.replace(tiny, max_position_embeddings=number)
        with pytest.raises(InputError, match=r"0\.position_indices differs from what .*max_position_embeddings make"):
            from_upstream(state, config)


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
