"""Attention's own autograd functions against autograd's derivative of the formulas of docs/model.md#attention."""

import pytest
import torch

from gptbert.model import GPTBert
from gptbert.model.gptbert import attention_mask
from kernels.attention_context import attention_context
from kernels.dropout import dropout
from tests.conftest import TINY
from tests.numerics import close

BUCKETS = 2 * TINY.position_bucket_size - 1
SEED = torch.tensor([77, -5], dtype=torch.int32)


def plain(query, key, position_query, position_key, value, buckets, mask, seed, dropout_prob):
    scores = query @ key.mT
    scores = scores + torch.einsum("hbid,hijd->hbij", query, position_key[:, buckets])
    scores = scores + torch.einsum("hijd,hbjd->hbij", position_query[:, buckets], key)
    exponentials = (scores - scores.detach().amax(-1, keepdim=True)).exp() * mask
    total = exponentials.sum(-1, keepdim=True)
    probabilities = exponentials / torch.where(total > 0, total, 1)
    return dropout(probabilities, seed, dropout_prob) @ value


def arguments(length=11, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    shapes = [(3, 2, length, 8), (3, 2, length, 8), (3, BUCKETS, 8), (3, BUCKETS, 8), (3, 2, length, 8)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    documents = torch.tensor([[0] * 4 + [1] * (length - 4), [0] * (length - 3) + [-1] * 3])
    return [tensor.requires_grad_() for tensor in tensors], documents


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dropout_prob", [0.0, 0.3])
def test_context_and_gradients_are_those_of_the_formula(causal, dropout_prob):
    tensors, documents = arguments()
    rest = GPTBert(TINY).position_buckets(11), attention_mask(documents, causal), SEED, dropout_prob
    results = []
    for function in (attention_context, plain):
        context = function(*tensors, *rest)
        results.append([context.detach(), *torch.autograd.grad(context.sin().sum(), tensors)])
    assert close(*results, tolerance=1e-12)


def test_a_query_that_sees_nothing_gives_zeros_and_takes_no_gradient():
    tensors, documents = arguments()
    mask = attention_mask(documents, causal=False)
    context = attention_context(*tensors, GPTBert(TINY).position_buckets(11), mask, None, 0.0)
    assert (context[:, 1, -3:] == 0).all()
    context.square().sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in tensors)
    assert (tensors[0].grad[:, 1, -3:] == 0).all()


def test_only_the_probabilities_are_kept():
    """Of all tensors with T × T elements per head, only probabilities may be saved for the backward."""
    tensors, documents = arguments()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda t: t):
        mask = attention_mask(documents, causal=False)
        attention_context(*tensors, GPTBert(TINY).position_buckets(11), mask, SEED, 0.1)
    assert [shape for shape in kept if shape[-2:] == (11, 11) and len(shape) == 4] == [(3, 2, 11, 11)]
