"""Dropout statistics: rates, independent positions and seeds; the same mask forward, backward and compiled."""

import dataclasses
import re

import pytest
import torch
import torch.nn.functional as F
from torch._inductor.utils import run_and_get_code

from gptbert.model.batch import Batch
from gptbert.model.block import BLOCK_SEEDS
from gptbert.model.dropout import Dropout, random_seeds
from gptbert.model.gptbert import DropoutSeeds, GPTBert
from kernels.dropout import dropout, random_words


@pytest.fixture
def seeds():
    torch.manual_seed(3)
    return random_seeds(6, torch.device("cpu"))


def test_each_mask_of_a_forward_has_seeds_of_its_own():
    seeds = torch.arange(2 * (2 + 3 * BLOCK_SEEDS)).view(-1, 2)
    parts = DropoutSeeds.split(seeds, 3)
    assert torch.equal(torch.stack([parts.embedding, *torch.cat(parts.blocks), parts.head]), seeds)
    assert torch.equal(parts.relative, torch.stack([block[0] for block in parts.blocks]))


def test_dropout_is_in_the_places_of_the_definition(tiny, monkeypatch):
    """In the order of docs/model.md, but for that of the probabilities, which is in `attention_context`."""
    seen = []

    def noted(x, seed, probability):
        seen.append((tuple(x.shape), seed.tolist(), probability))
        return x

    monkeypatch.setattr("gptbert.model.dropout.dropout", noted)
    model = GPTBert(dataclasses.replace(tiny, hidden_dropout_prob=0.25)).train()
    rows = torch.arange(10).view(2, 5)
    seeds = model.dropout_seeds(rows.device)
    model(Batch(rows, torch.zeros_like(rows), rows, num_masked=1), dropout_seeds=seeds)
    states, relative = (2, 5, tiny.hidden_size), (2 * tiny.position_bucket_size - 1, tiny.hidden_size)
    layer = [relative, None, states, states]
    shapes = [states, *layer * tiny.num_hidden_layers, (10, tiny.hidden_size)]
    assert seen == [(shape, seed, 0.25) for shape, seed in zip(shapes, seeds.tolist(), strict=True) if shape]


@pytest.mark.parametrize("name", ["attention_probs_dropout_prob", "hidden_dropout_prob"])
def test_each_probability_drops_in_training_alone(tiny, name):
    model = GPTBert(dataclasses.replace(tiny, **{name: 0.5}))
    rows = torch.arange(10).view(1, 10), torch.zeros(1, 10, dtype=torch.long)
    one, other, whole, again = (model.train(mode).encode(*rows, True) for mode in (True, True, False, False))
    assert torch.equal(whole, again)
    assert not torch.equal(one, whole)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_dropout_drops_at_its_rate_and_scales_what_is_kept(seeds, probability):
    dropped = dropout(torch.ones(1000, 1000), seeds[0], probability)
    kept = dropped != 0
    sigma = (probability * (1 - probability) / kept.numel()) ** 0.5
    assert abs(kept.double().mean().item() - (1 - probability)) < 5 * sigma
    torch.testing.assert_close(dropped[kept], torch.full_like(dropped[kept], 1 / (1 - probability)))


def test_places_and_seeds_are_independent(seeds):
    masks = torch.stack([dropout(torch.ones(2**20), seed, 0.3) == 0 for seed in seeds]).double() - 0.3
    bound = 5 * 0.3 * 0.7 / 2**10  # five sigma of the mean of a product
    for one in range(len(masks)):
        for distance in (1, 2, 64, 128, 384, 2**14):
            assert abs((masks[one, :-distance] * masks[one, distance:]).mean().item()) < bound
        for other in range(one):
            assert abs((masks[one] * masks[other]).mean().item()) < bound


def test_every_bit_is_fair_and_words_do_not_repeat(seeds):
    words = random_words(torch.Size([2**20]), seeds[0])
    for bit in range(32):
        assert abs(((words >> bit) & 1).double().mean().item() - 0.5) < 5 * 0.5 / 2**10
    assert len(words.unique()) == len(words)  # a permutation of the indices


def test_neighboring_seeds_share_nothing():
    seeds = torch.tensor([[5, 7], [6, 7], [5, 8]], dtype=torch.int32)
    masks = torch.stack([dropout(torch.ones(2**18), seed, 0.5) == 0 for seed in seeds])
    for other in (1, 2):
        assert abs((masks[0] == masks[other]).double().mean().item() - 0.5) < 5 * 0.5 / 2**9


def test_the_gradient_has_the_mask_of_the_forward(seeds):
    x = torch.ones(50, 40, requires_grad=True)
    dropped = dropout(x, seeds[0], 0.4)
    dropped.sum().backward()
    assert torch.equal(x.grad, dropped.detach())
    assert 0 < (x.grad == 0).sum() < x.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_drops_the_same_entries(seeds, dtype):
    x = torch.randn(37, 53).to(dtype)
    torch.compiler.reset()
    compiled = torch.compile(dropout, fullgraph=True)(x, seeds[1], 0.2)
    assert torch.equal(compiled, dropout(x, seeds[1], 0.2))


def test_compiled_behind_a_padding_all_numbers_have_32_bits(seeds):
    """Triton accepts only 32-bit literals, and Inductor folds a multiplier times the padding's offset into one."""

    def padded(x, seed):
        return F.pad(dropout(x, seed, 0.25), (0, 0, 1, 0))

    torch.compiler.reset()
    x = torch.randn(64, 768)
    compiled, codes = run_and_get_code(torch.compile(padded, fullgraph=True, dynamic=False), x, seeds[1])
    assert torch.equal(compiled, padded(x, seeds[1]))
    integers = [int(number) for code in codes for number in re.findall(r"(?<![\w.])\d+(?=L\b|\))", code)]
    assert 2**16 < max(integers) < 2**32


def test_eval_mode_no_seed_and_no_probability_leave_everything():
    x, seed = torch.randn(5), torch.tensor([1, 2], dtype=torch.int32)
    module = Dropout(0.5)
    assert not torch.equal(module(x, seed), x)
    assert module(x, None) is x
    assert Dropout(0.0)(x, seed) is x
    assert module.eval()(x, seed) is x
