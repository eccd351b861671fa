"""Continuing a text with keys and values of its earlier positions, against the whole text at each token."""

import pytest
import torch

from gptbert.generate import continue_text, distribution
from gptbert.model.key_value_cache import KeyValueCache
from gptbert.text.encoding import decode_behind, encode_prompt
from gptbert.text.tokenizer import load_tokenizer, ordinary_ids
from tests.exported import SHAPE, random_model
from tests.runs import write_inputs

LENGTH = SHAPE.max_position_embeddings + 9  # distances beyond the last bucket too


@pytest.fixture(scope="module")
def model():
    return random_model(3)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_inputs(tmp_path_factory.mktemp("cache"), train_characters=10_000) / "tokenizer.json")


@torch.no_grad()
@pytest.mark.parametrize("prompt", [1, 2, LENGTH - 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_representations_are_those_of_the_whole_text(prompt, dtype):
    model = random_model(3).to(dtype)
    ids = torch.randint(16, SHAPE.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    cache = KeyValueCache(LENGTH)
    parts = [model.encode_next(ids[:, :prompt], cache)]
    parts += [model.encode_next(token, cache) for token in ids[:, prompt:].split(1, dim=1)]
    expected = model.encode(ids, torch.zeros_like(ids), causal=True)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=tolerance, atol=tolerance)


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_are_those_of_the_whole_text(model, tokenizer, temperature):
    allowed, prompt = torch.tensor(ordinary_ids(tokenizer)), "The name"
    start = encode_prompt(tokenizer, prompt)
    for seed in range(3):
        ids, generator = list(start), torch.Generator().manual_seed(seed)
        for _ in range(LENGTH):
            states = model.encode(torch.tensor([ids]), torch.zeros(1, len(ids)), causal=True)
            logits = model.logits(states)[0, -1, allowed]
            if temperature:
                choice = torch.multinomial(distribution(logits, temperature, 40, 1.0), 1, generator=generator)
            else:
                choice = logits.argmax()
            ids.append(int(allowed[choice]))
        assert len(set(ids[len(start) :])) > 5
        expected = prompt + decode_behind(tokenizer, start, ids[len(start) :])
        assert continue_text(model, tokenizer, prompt, LENGTH, temperature, seed=seed) == expected


def test_what_a_cache_does_not_take(model):
    cache = KeyValueCache(3)
    ids = torch.tensor([[1, 17]])
    model.encode_next(ids, cache)
    with pytest.raises(ValueError, match="2 positions behind 2: after the first call, one at a time"):
        model.encode_next(ids, cache)
    model.encode_next(ids[:, :1], cache)
    with pytest.raises(ValueError, match="the cache has room for 3 positions, not for 4"):
        model.encode_next(ids[:, :1], cache)
