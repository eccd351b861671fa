"""Bucket sums against scatter_add, across lengths, dtypes and chunk sizes."""

import dataclasses

import pytest
import torch

from gptbert.config import ModelConfig
from gptbert.model import GPTBert
from kernels.attention_context import bucket_sums as module
from kernels.attention_context.bucket_sums import bucket_sums
from tests.conftest import TINY
from tests.numerics import assert_accurate

BUCKETS = 2 * TINY.position_bucket_size - 1


def by_scatter(grad, buckets, num_buckets=BUCKETS):
    index = buckets.expand_as(grad)
    by_query = grad.new_zeros(*grad.shape[:-1], num_buckets).scatter_add(-1, index, grad)
    by_key = grad.new_zeros(*grad.shape[:-1], num_buckets).scatter_add(-1, index.mT, grad.mT)
    return by_query, by_key


@pytest.fixture(scope="module")
def table():
    model = GPTBert(TINY)
    return model.position_buckets


@pytest.mark.parametrize("length", [1, 2, 3, 15, 16, 17, 32, 45])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_bucket_sums_agree_with_a_scatter(table, length, dtype):
    generator = torch.Generator().manual_seed(length)
    grad = torch.randn(3, 2, length, length, generator=generator).to(dtype)
    exact = by_scatter(grad.double(), table(length))
    plain = by_scatter(grad, table(length))
    for actual, *expected in zip(bucket_sums(grad, table(length), BUCKETS), exact, plain, strict=True):
        assert_accurate(actual, *expected)


@pytest.mark.parametrize("chunk", [1, 5, 6, 100])
def test_bucket_sums_do_not_depend_on_the_size_of_pieces(table, monkeypatch, chunk):
    length = 9
    monkeypatch.setattr(module, "_CHUNK_ON_CPU", chunk * length * 32)
    grad = torch.randn(4, 3, length, length, dtype=torch.float64)
    for actual, expected in zip(
        bucket_sums(grad, table(length), BUCKETS), by_scatter(grad, table(length)), strict=True
    ):
        torch.testing.assert_close(actual, expected)


def test_memory_that_is_not_contiguous(table):
    grad = torch.randn(2, 12, 3, 12, dtype=torch.float64).transpose(1, 2)
    for actual, expected in zip(bucket_sums(grad, table(12), BUCKETS), by_scatter(grad, table(12)), strict=True):
        torch.testing.assert_close(actual, expected)


def test_is_a_well_made_operation(table):
    torch.library.opcheck(bucket_sums, (torch.randn(2, 3, 7, 7), table(7), BUCKETS))


def test_two_calls_give_the_same_bits(table):
    grad = torch.randn(8, 6, 64, 64)
    pairs = zip(bucket_sums(grad, table(64), BUCKETS), bucket_sums(grad, table(64), BUCKETS), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_bucket_sums_at_the_published_sizes_agree_with_a_scatter():
    config = dataclasses.replace(ModelConfig.from_json("configs/small.json"), num_hidden_layers=1, vocab_size=64)
    model = GPTBert(config)
    assert model.bucket_of_distance.shape == (2 * config.max_position_embeddings - 1,)
    buckets, num_buckets = model.position_buckets(512), 2 * config.position_bucket_size - 1
    grad = torch.randn(1, 2, 512, 512, dtype=torch.float64)
    for actual, expected in zip(
        bucket_sums(grad, buckets, num_buckets), by_scatter(grad, buckets, num_buckets), strict=True
    ):
        torch.testing.assert_close(actual, expected)
