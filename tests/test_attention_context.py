"""Attention's C++ kernels against the formulas in fp64, across odd sizes, masks and seeds."""

import pytest
import torch

from gptbert.model import GPTBert
from gptbert.model.gptbert import attention_mask
from kernels.attention_context import eager
from kernels.attention_context.cpp import attention_weights, attention_weights_backward
from kernels.dropout import dropout
from tests.conftest import TINY
from tests.numerics import assert_accurate, on_threads, same, scattered

BUCKETS = 2 * TINY.position_bucket_size - 1
SEED = torch.tensor([77, -5], dtype=torch.int32)


@pytest.fixture(scope="module")
def table():
    return GPTBert(TINY).position_buckets


def make_case(length, rows=3, heads=2, *, causal=False, size=2.0):
    """Content, query and key scores; a document mask whose last row ends in padding; and a gradient."""
    generator = torch.Generator().manual_seed(length)
    square = (heads, rows, length, length)
    shapes = [square, (*square[:3], BUCKETS), (heads, BUCKETS, rows, length), square]
    *scores, grad = [(size * torch.randn(shape, generator=generator)).bfloat16() for shape in shapes]
    documents = torch.randint(3, (rows, length), generator=generator).sort(dim=1).values
    documents[-1, (3 * length + 3) // 4 :] = -1
    return scores, attention_mask(documents, causal), grad


def wide(tensors):
    return [tensor.double() for tensor in tensors]


@pytest.mark.parametrize("length", [1, 2, 3, 16, 17, 45, 128, 200])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("heads", [1, 6])
@pytest.mark.parametrize(("causal", "seed", "probability"), [(False, SEED, 0.3), (True, None, 0.0)])
def test_probabilities_and_gradients_are_as_accurate_as_pytorch(table, length, rows, heads, causal, seed, probability):
    scores, mask, grad = make_case(length, rows, heads, causal=causal)
    rest = table(length), mask, seed, probability
    results = attention_weights(*scores, *rest)
    exact = eager.attention_weights(*wide(scores), *rest)
    plain = eager.attention_weights(*scores, *rest)
    for actual, *expected in zip(results[: 1 if seed is None else 2], exact, plain, strict=seed is not None):
        assert_accurate(actual, *expected)
    rest = table(length), BUCKETS, seed, probability
    results = attention_weights_backward(grad, plain[0], *rest)
    exact = eager.attention_weights_backward(*wide([grad, plain[0]]), *rest)
    plain = eager.attention_weights_backward(grad, plain[0], *rest)
    names = ["scores", "by_query", "by_key", "dropped"][: 3 if seed is None else 4]
    for name, actual, *expected in zip(names, results, exact, plain, strict=False):
        assert_accurate(actual, *expected, name=name)


def test_a_bucket_may_hold_distances_that_are_apart():
    position = torch.arange(29)
    buckets = (position[:, None] - position).abs() // 3 % BUCKETS
    scores, mask, grad = make_case(29)
    rest = buckets, mask, None, 0.0
    exact = eager.attention_weights(*wide(scores), *rest)[0]
    assert_accurate(attention_weights(*scores, *rest)[0], exact, exact.bfloat16())
    probabilities, rest = exact.bfloat16(), (buckets, BUCKETS, None, 0.0)
    by_query, by_key = attention_weights_backward(grad, probabilities, *rest)[1:3]
    of_scores = eager.attention_weights_backward(*wide([grad, probabilities]), *rest)[0]
    for actual, index, of_each in ((by_query, buckets, of_scores), (by_key, buckets.mT, of_scores.mT)):
        exact = of_scores.new_zeros(2, 3, 29, BUCKETS).scatter_add(-1, index.expand_as(of_each), of_each)
        exact = exact if actual is by_query else exact.permute(0, 3, 1, 2)
        assert_accurate(actual, exact, exact.bfloat16())


def test_scores_so_large_that_one_key_takes_all(table):
    scores, mask, _ = make_case(45, size=300.0)
    rest = table(45), mask, None, 0.0
    exact = eager.attention_weights(*wide(scores), *rest)[0]
    assert_accurate(attention_weights(*scores, *rest)[0], exact, exact.bfloat16())


@pytest.mark.parametrize("seed", [SEED, torch.tensor([-(2**31), 2**31 - 1], dtype=torch.int32)])
@pytest.mark.parametrize("probability", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("length", [11, 33])
def test_dropout_is_that_of_pytorch_to_the_bit(table, seed, probability, length):
    scores, mask, grad = make_case(length)
    probabilities, dropped = attention_weights(*scores, table(length), mask, seed, probability)
    expected = dropout(probabilities, seed, probability)
    assert torch.equal(dropped, expected)
    assert 0 < (expected != 0).sum() < (probabilities != 0).sum()
    *_, again = attention_weights_backward(grad, probabilities, table(length), BUCKETS, seed, probability)
    assert torch.equal(again, expected)


def test_without_a_seed_there_is_no_dropout(table):
    scores, mask, grad = make_case(9)
    probabilities, dropped = attention_weights(*scores, table(9), mask, None, 0.0)
    assert dropped.shape == (0,)
    assert attention_weights_backward(grad, probabilities, table(9), BUCKETS, None, 0.0)[3].shape == (0,)


@pytest.mark.parametrize("causal", [False, True])
def test_keys_that_are_masked_get_nothing_and_are_not_read(table, causal):
    scores, mask, grad = make_case(19, causal=causal)
    probabilities, _ = attention_weights(*scores, table(19), mask, None, 0.0)
    hidden = ~mask.expand_as(probabilities)
    assert (probabilities[hidden] == 0).all()
    assert not causal or (probabilities.triu(1) == 0).all()
    grad_scores, *_ = attention_weights_backward(grad, probabilities, table(19), BUCKETS, None, 0.0)
    assert (grad_scores[hidden] == 0).all()
    for content in (torch.nan, torch.inf, 3e38):
        scores[0][hidden] = content
        assert torch.equal(attention_weights(*scores, table(19), mask, None, 0.0)[0], probabilities)


@pytest.mark.parametrize("seed", [SEED, None])
def test_a_query_that_sees_nothing_gives_zeros_and_takes_no_gradient(table, seed):
    scores, mask, grad = make_case(11)
    assert not mask[-1, -2:].any()
    probabilities, dropped = attention_weights(*scores, table(11), mask, seed, 0.2)
    assert (probabilities[:, -1, -2:] == 0).all()
    assert seed is None or (dropped[:, -1, -2:] == 0).all()
    of_scores, by_query, _, _ = attention_weights_backward(grad, probabilities, table(11), BUCKETS, seed, 0.2)
    assert (of_scores[:, -1, -2:] == 0).all()
    assert (by_query[:, -1, -2:] == 0).all()


def test_what_is_not_a_number_stays_none_in_its_row_alone(table):
    scores, mask, grad = make_case(21)
    mask[0, 4] = True
    before = attention_weights(*scores, table(21), mask, SEED, 0.2)
    gradients = attention_weights_backward(grad, before[0], table(21), BUCKETS, SEED, 0.2)
    others = torch.ones_like(mask[0, :, 0]).expand(2, 3, 21).clone()
    others[1, 0, 4] = False
    scores[0][1, 0, 4, 7] = torch.nan
    after = attention_weights(*scores, table(21), mask, SEED, 0.2)
    assert all(tensor[1, 0, 4].isnan().all() for tensor in after)
    assert same([tensor[others] for tensor in after], [tensor[others] for tensor in before])

    grad[1, 0, 4, 7] = torch.nan
    before[0][1, 0, 4, 7] = 0.5
    after = attention_weights_backward(grad, before[0], table(21), BUCKETS, SEED, 0.2)
    assert after[0][1, 0, 4].isnan().all()
    assert after[1][1, 0, 4, table(21)[4]].isnan().all()
    assert same([tensor[others] for tensor in after[:2]], [tensor[others] for tensor in gradients[:2]])
    # a key's bucket may hold gradients of other queries only
    assert after[2][1, table(21)[4], 0, torch.arange(21)].isnan().all()
    assert (after[2][1, :, 0].isnan().sum(dim=0) == 1).all()
    assert not after[2][0].isnan().any()
    assert not after[2][:, :, 1:].isnan().any()


@pytest.mark.parametrize("length", [17, 64])
def test_two_calls_and_two_threads_give_the_same_bits(table, length):
    scores, mask, grad = make_case(length, heads=5)
    forward = (attention_weights, *scores, table(length), mask, SEED, 0.3)
    expected = on_threads(1, *forward)
    backward = (attention_weights_backward, grad, expected[0], table(length), BUCKETS, SEED, 0.3)
    for call in (forward, backward):
        expected = on_threads(1, *call)
        assert same(on_threads(1, *call), expected)
        assert same(on_threads(2, *call), expected)


def test_memory_that_is_not_contiguous(table):
    scores, mask, grad = make_case(13)
    expected = attention_weights(*scores, table(13), mask, SEED, 0.3)
    strided = [scattered(tensor) for tensor in (*scores, table(13), mask)]
    assert same(attention_weights(*strided, SEED, 0.3), expected)
    rest = BUCKETS, SEED, 0.3
    gradients = attention_weights_backward(grad, expected[0], table(13), *rest)
    strided = [grad.mT.contiguous().mT, scattered(expected[0]), scattered(table(13))]
    assert same(attention_weights_backward(*strided, *rest), gradients)


@pytest.mark.parametrize("seed", [SEED, None])
def test_are_well_made_operations(table, seed):
    scores, mask, grad = make_case(7)
    torch.library.opcheck(attention_weights, (*scores, table(7), mask, seed, 0.3))
    probabilities = attention_weights(*scores, table(7), mask, None, 0.3)[0]
    torch.library.opcheck(attention_weights_backward, (grad, probabilities, table(7), BUCKETS, seed, 0.3))
