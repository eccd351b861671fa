"""The model's operations in the form that runs on a GPU, against fp64 on the CPU, with gradients."""

import pytest
import torch
import torch.nn.functional as F

from gptbert.model import GPTBert
from gptbert.model.gptbert import attention_mask
from gptbert.model.layer_weighting import LayerWeighting, Representations
from kernels.add_bias import add_bias
from kernels.attention_context import attention_context
from kernels.attention_context import bucket_sums as sums
from kernels.dropout import dropout, random_words
from kernels.gated_norm import gated_norm
from kernels.normalize import normalize
from tests.conftest import TINY
from tests.numerics import assert_near, relative_error, same

BUCKETS = 2 * TINY.position_bucket_size - 1
EPS = 1e-5
SEED = (77, -5)


def attention(query, key, position_query, position_key, value):
    """Attention over documents with padding, rows of both objectives, and dropout."""
    rows, length = query.shape[1:3]
    documents = (torch.arange(length) >= length // 3).long().repeat(rows, 1)
    documents[-1, -2:] = -1
    causal = torch.arange(rows) % 2 == 0
    mask = attention_mask(documents, causal).to(query.device)
    buckets, seed = GPTBert(TINY).position_buckets(length), torch.tensor(SEED, dtype=torch.int32)
    rest = (buckets.to(query.device), mask, seed.to(query.device), 0.1)
    return attention_context(query, key, position_query, position_key, value, *rest)


def gated_feed_forward(gate, weight):
    return gated_norm(gate, None, weight, approximate="tanh", eps=EPS)


def gated_attention(gate, linear, weight):
    return gated_norm(gate, linear, weight, approximate="none", eps=EPS)


def biased(x, weight, bias):
    return add_bias(F.linear(x, weight.to(x.dtype)), bias)


def normalized(x):
    return normalize(x, EPS)


def dropped(x):
    return dropout(x, torch.tensor(SEED, dtype=torch.int32, device=x.device), 0.3)


def mixed(first, *changes):
    """A layer weighting after each change, with weights away from their initial values."""
    representations = Representations(len(changes) + 1)
    state = representations.start(first)
    for index, change in enumerate(changes):
        weighting = LayerWeighting(index + 2).to(first.device, first.dtype)
        weighting.alpha.data += 0.1 * torch.arange(index + 2, device=first.device)
        state = weighting(torch.tanh(state) + change, representations)
    return state


HEADS = (4, 3, 17, 8)  # [H, B, T, d]
# function; input shapes; whether it is tested in bf16 too
CASES = {
    "attention": (attention, [HEADS, HEADS, (4, BUCKETS, 8), (4, BUCKETS, 8), HEADS], True),
    "gated feed-forward": (gated_feed_forward, [(3, 17, 96), (32, 48)], True),
    "gated attention": (gated_attention, [(3, 17, 32), HEADS, (16, 32)], True),
    "bias": (biased, [(3, 17, 24), (40, 24), (40,)], True),
    "normalize": (normalized, [(5, 17, 24)], True),
    "dropout": (dropped, [(5, 17, 24)], True),
    "mixes": (mixed, [(3, 17, 24)] * 4, False),
}


def outcome(function, tensors, device, dtype):
    """Result and gradients as in training: fp32 leaves, under autocast for bf16."""
    in_autocast = dtype == torch.bfloat16
    leaf_dtype = torch.float32 if in_autocast and function is not attention else dtype
    leaves = [tensor.to(device, leaf_dtype).requires_grad_() for tensor in tensors]
    with torch.autocast(device.type, torch.bfloat16, enabled=in_autocast):
        result = function(*leaves)
    grad = torch.linspace(-1, 1, result.numel(), dtype=torch.float64).sin().view(result.shape)
    return [result.detach(), *torch.autograd.grad(result, leaves, grad.to(device, result.dtype))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_fp64_on_the_cpu(name, dtype, device):
    function, shapes, is_narrow = CASES[name]
    if dtype == torch.bfloat16 and not is_narrow:
        pytest.skip("in fp32 always")
    generator = torch.Generator().manual_seed(len(name))
    tensors = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    cpu = torch.device("cpu")
    actual = outcome(function, tensors, device, dtype)
    again = outcome(function, tensors, device, dtype)
    assert same(actual, again)
    exact, plain = outcome(function, tensors, cpu, torch.float64), outcome(function, tensors, cpu, dtype)
    for index, (one, *others) in enumerate(zip(actual, exact, plain, strict=True)):
        assert_near(one, *others, dtype, name=f"{name} {index}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 17, 45])
def test_bucket_sums_over_several_pieces(device, dtype, length, monkeypatch):
    for name in ("_CHUNK", "_CHUNK_ON_CPU"):
        monkeypatch.setattr(sums, name, 4 * length * 96)
    buckets = GPTBert(TINY).position_buckets(length).to(device)
    grad = torch.randn(5, 3, length, length, generator=torch.Generator().manual_seed(length)).to(device, dtype)
    exact = []
    for of, index in ((grad.double(), buckets), (grad.double().mT, buckets.mT)):
        zeros = of.new_zeros(*of.shape[:-1], BUCKETS)
        exact.append(zeros.scatter_add(-1, index.expand_as(of), of))
    for actual, expected in zip(sums.bucket_sums(grad, buckets, BUCKETS), exact, strict=True):
        assert relative_error(actual, expected) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("shape", [(7,), (37, 53), (2, 3, 64, 64)])
def test_the_random_words_are_the_cpus(device, shape):
    seed = torch.tensor(SEED, dtype=torch.int32)
    expected = random_words(torch.Size(shape), seed)
    assert torch.equal(random_words(torch.Size(shape), seed.to(device)).cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_drops_the_same_entries_also_behind_padding(device, dtype, sized):
    """Inductor may transform an element's index; forward and backward must still drop the same elements."""
    backend = sized("inductor", "aot_eager")

    def padded(x):
        return F.pad(dropped(x), (0, 3)) * 2

    x = torch.randn(6, 65, 61, generator=torch.Generator().manual_seed(1)).to(device, dtype).requires_grad_()
    torch.compiler.reset()
    results = []
    for function in (padded, torch.compile(padded, fullgraph=True, backend=backend)):
        result = function(x)
        results.append([result.detach(), *torch.autograd.grad(result.sum(), x)])
    assert same(*results)
    assert 0.2 < (results[0][1] == 0).double().mean() < 0.4
