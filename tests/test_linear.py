"""Linear layers of packed parameters: results and gradients of F.linear, and the memory of their gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gptbert.distributed.flat_gradients import FlatGradients
from gptbert.distributed.world import World
from gptbert.model import GPTBert
from gptbert.muon import MuonWithAdamW, hidden_matrices
from gptbert.optim import Lamb, WeightAverage, parameter_groups, update_weights
from gptbert.training import packed_weights
from gptbert.training.packed_weights import PackedWeights
from kernels import torch_private, wanted
from kernels.backend import set_default_backend
from kernels.linear import (
    Packed,
    add_row_sums,
    add_weight_gradient,
    linear,
    linear_and_first,
    multiplies_into_fp32,
    row_sums,
    weight_gradient,
)
from tests.conftest import TINY
from tests.numerics import assert_accurate

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)


def make_layers(num_layers, *, seed=0):
    """Parameters of layers with the same input: weights [E, 6], and biases; and x [2, 5, 6]."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (32, 64, 32)[:num_layers]
    weights = [nn.Parameter(torch.randn(size, 6, generator=generator)) for size in sizes]
    biases = [nn.Parameter(torch.randn(size, generator=generator)) for size in sizes]
    return weights, biases, torch.randn(2, 5, 6, generator=generator)


def give_memory(weights, biases):
    """Gradients that stay, of ones, so that adding shows; the optimizer's order is weight, bias, weight, …"""
    FlatGradients([param for pair in zip(weights, biases, strict=True) for param in pair], ALONE).buffer.fill_(1)


def run(weights, biases, x, dtype, *, has_bias=True, has_memory=False, repeats=1):
    """The layers' results, side by side, and gradients of x, weights and biases."""
    if has_memory:
        give_memory(weights, biases)
    packed = [Packed.of(parts, dtype) for parts in (weights, biases)]
    if has_memory:
        packed = [each.with_gradient() for each in packed]
        assert all(each.gradient is not None for each in packed)
    x = x.to(dtype).detach().requires_grad_()
    for _ in range(repeats):
        y = linear(x, packed[0], packed[1] if has_bias else None)
        y.backward(torch.cos(y.detach()))
    grads = [param.grad for param in (*weights, *(biases if has_bias else ()))]
    return y.detach(), x.grad, *(grad - 1 if has_memory else grad for grad in grads)


def definition(weights, biases, x, dtype, *, has_bias=True, repeats=1):
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (x, *weights, *biases)]
    count = len(weights)
    inputs, own_weights, own_biases = leaves[0], leaves[1 : count + 1], leaves[count + 1 :]
    for _ in range(repeats):
        layers = zip(own_weights, own_biases, strict=True)
        y = torch.cat([F.linear(inputs, weight, bias if has_bias else None) for weight, bias in layers], dim=-1)
        y.backward(torch.cos(y.detach()))
    return y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)


@pytest.mark.parametrize("has_memory", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("num_layers", "repeats"), [(1, 1), (3, 1), (2, 2)])
def test_results_and_gradients_are_those_of_the_layers(has_memory, has_bias, num_layers, repeats):
    case, settings = make_layers(num_layers), {"has_bias": has_bias, "repeats": repeats}
    actual = run(*case, torch.float32, has_memory=has_memory, **settings)
    exact, plain = (definition(*case, dtype, **settings) for dtype in (torch.float64, torch.float32))
    for index, tensors in enumerate(zip(actual, exact, plain, strict=True)):
        assert_accurate(*tensors, name=str(index))


@pytest.mark.parametrize("has_memory", [False, True])
def test_products_in_bf16_have_gradients_in_fp32(has_memory):
    weights, biases, x = make_layers(2)
    results = run(weights, biases, x, torch.bfloat16, has_memory=has_memory)
    exact = definition(weights, biases, x, torch.float64)
    assert [result.dtype for result in results] == [torch.bfloat16] * 2 + [torch.float32] * 4
    for actual, expected in zip(results, exact, strict=True):
        assert (actual.double() - expected).norm() < 0.02 * expected.norm()


def run_and_first(weights, biases, x, others, *, has_memory, function=linear_and_first):
    """Both products' results, and gradients of both inputs, weights and biases."""
    for param in (*weights, *biases):
        param.grad = None
    packed = [Packed.of(parts, torch.float32) for parts in (weights, biases)]
    if has_memory:
        give_memory(weights, biases)
        packed = [each.with_gradient() for each in packed]
    leaves = [tensor.detach().requires_grad_() for tensor in (x, others)]
    for _ in range(2):
        results = function(*leaves, *packed)
        torch.autograd.backward(results, [torch.cos(result.detach()) for result in results])
    grads = [param.grad - 1 if has_memory else param.grad for param in (*weights, *biases)]
    return *(result.detach() for result in results), *(leaf.grad for leaf in leaves), *grads


def first_definition(weights, biases, x, others, dtype):
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (x, others, *weights, *biases)]
    first_x, count = leaves[1], len(weights)
    own_weights, own_biases = leaves[2 : count + 2], leaves[count + 2 :]
    for _ in range(2):
        results = (
            F.linear(leaves[0], torch.cat(own_weights), torch.cat(own_biases)),
            F.linear(first_x, own_weights[0], own_biases[0]),
        )
        torch.autograd.backward(results, [torch.cos(result.detach()) for result in results])
    return *(result.detach() for result in results), *(leaf.grad for leaf in leaves)


@pytest.mark.parametrize("has_memory", [False, True])
def test_other_rows_by_the_first_parameter(has_memory):
    weights, biases, x = make_layers(3)
    case = (weights, biases, x, torch.randn(4, 6, generator=torch.Generator().manual_seed(1)))
    actual = run_and_first(*case, has_memory=has_memory)
    exact, plain = (first_definition(*case, dtype) for dtype in (torch.float64, torch.float32))
    for index, tensors in enumerate(zip(actual, exact, plain, strict=True)):
        assert_accurate(*tensors, name=str(index))


def test_gradients_elsewhere_are_left_to_autograd():
    weights, biases, _ = make_layers(2)
    packed = Packed.of(weights, torch.float32)
    assert packed.with_gradient().gradient is None, "there are none"
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    assert packed.with_gradient().gradient is None, "not in one tensor"
    memory = torch.zeros(97, 6)
    weights[0].grad, weights[1].grad = memory[:32], memory[33:]
    assert packed.with_gradient().gradient is None, "a row apart"
    weights[1].grad = torch.zeros(97, 6)[32:96]
    assert packed.with_gradient().gradient is None, "at the right place of another tensor"
    weights[1].grad = memory[32:96]
    assert packed.with_gradient().gradient.shape == (96, 6)
    biases[0].grad = torch.zeros(64)[::2]
    assert Packed.of(biases[:1], torch.float32).with_gradient().gradient is None, "not contiguous"


def test_operations_are_registered_rightly():
    grad, x = torch.randn(7, 4), torch.randn(7, 3)
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(weight_gradient, (grad.to(dtype), x.to(dtype)))
        rows = (grad.to(dtype), x.to(dtype), torch.ones(4, 3))
        first = grad[:5, :2].to(dtype), x[:5].to(dtype)
        for others in ((), first, (*first, True)):
            torch.library.opcheck(add_weight_gradient, (*rows, *others))
        torch.library.opcheck(row_sums, (grad.to(dtype),))
        for first in ((), (grad[:5, :2].to(dtype),)):
            torch.library.opcheck(add_row_sums, (grad.to(dtype), torch.ones(4), *first))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("has_memory", [False, True])
def test_compiled_equals_eager(fresh_compiler, backend, has_memory):
    """Over several backwards, which add to the same memory."""
    weights, biases, x = make_layers(2)
    case = (weights, biases, x, torch.randn(4, 6, generator=torch.Generator().manual_seed(1)))

    def function(x, others, weight, bias):
        y, of_others = linear_and_first(x, others, weight, bias)
        return y + linear(x, weight).sin(), of_others

    compiled = torch.compile(function, fullgraph=True, dynamic=False, backend=backend)
    ends = [run_and_first(*case, has_memory=has_memory, function=each) for each in (function, compiled)]
    for eager, actual in zip(*ends, strict=True):
        torch.testing.assert_close(actual, eager)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_overwrites_what_is_in_memory(fresh_compiler, backend, dtype):
    """Even NaN; but what other rows have for the first parameter is added, and so are biases' gradients."""
    weights, biases, x = make_layers(2)
    leaves = [x.to(dtype), torch.randn(4, 6, generator=torch.Generator().manual_seed(1)).to(dtype)]
    packed = [Packed.of(parts, dtype) for parts in (weights, biases)]
    function = linear_and_first if backend is None else torch.compile(linear_and_first, fullgraph=True, backend=backend)

    def gradients():
        results = function(*leaves, *own)
        torch.autograd.backward(results, [torch.cos(result.detach()) for result in results])
        return [param.grad.clone() for param in (*weights, *biases)]

    give_memory(weights, biases)
    own = [each.with_gradient() for each in packed]
    expected = [grad - 1 for grad in gradients()]
    own = [packed[0].with_gradient(overwrites=True), own[1]]
    for _ in range(2):
        own[0].gradient.fill_(torch.nan)
        own[1].gradient.zero_()
        for actual, grad in zip(gradients(), expected, strict=True):
            torch.testing.assert_close(actual, grad, rtol=1e-4, atol=1e-5)


@pytest.fixture
def model():
    set_default_backend("triton")
    wanted.use_fused(wanted.FUSED)
    torch.manual_seed(0)
    return GPTBert(TINY)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_follow_the_weights(model, dtype):
    weights = PackedWeights(model, dtype)

    def are_copies():
        block = model.blocks[1]
        expected = torch.cat([block.attention.query_key.weight, block.attention.value_gate.weight]).to(dtype)
        (projection, bias, output), (up, down) = weights.weights.blocks[1]
        pairs = [(projection, expected), (output, block.attention.output.weight), (up, block.feed_forward.up.weight)]
        pairs += [(bias, torch.cat([block.attention.query_key.bias, block.attention.value_gate.bias]))]
        pairs += [
            (down, block.feed_forward.down.weight),
            (weights.weights.words, model.embedding.word_embedding.weight),
        ]
        return all(torch.equal(packed.narrow, tensor.to(dtype)) for packed, tensor in pairs)

    assert are_copies()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(1)
    assert not are_copies()
    weights.refresh_if_changed()
    assert are_copies()
    places = [packed.narrow.data_ptr() for packed in weights._all()]
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(2)
    weights.note_update()
    weights.refresh_if_changed()
    assert not are_copies(), "the update was said to have written them"
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
    weights.refresh_if_changed()
    assert are_copies()
    assert places == [packed.narrow.data_ptr() for packed in weights._all()], "where a graph reads them"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", ["lamb", "adamw", "muon"])
def test_an_update_writes_the_copies(model, dtype, optimizer, monkeypatch):
    """LAMB's kernel in its own pass, others after it; not those of weights that only look changed."""
    weights, average = PackedWeights(model, dtype), WeightAverage(model, 0.9)
    makers = {
        "lamb": lambda: Lamb(parameter_groups(model, 0.1), lr=0.1),
        "adamw": lambda: torch.optim.AdamW(parameter_groups(model, 0.1), lr=0.1, fused=True),
        "muon": lambda: MuonWithAdamW(
            hidden_matrices(model), [{"params": [model.embedding.word_embedding.weight]}], lr=0.1, weight_decay=0.1
        ),
    }
    own, copied, optimizer = torch_private.copy_each, [], makers[optimizer]()
    monkeypatch.setattr(torch_private, "copy_each", lambda *lists: copied.append(1) or own(*lists))
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator)
        if step == 1:
            model.blocks[0].feed_forward.up.weight.grad[3, 2] = torch.inf
        if step == 2:
            model.load_state_dict({name: 1.5 * tensor for name, tensor in model.state_dict().items()})
            weights.refresh_if_changed()
        before = model.blocks[0].feed_forward.up.weight.detach().clone()
        norm = update_weights(optimizer, model, average, 1.0, weights.copies)
        weights.note_update()
        weights.refresh_if_changed()
        assert norm.isfinite() == (step != 1)
        assert torch.equal(model.blocks[0].feed_forward.up.weight, before) == (step == 1)
        for packed in weights._all():
            expected = torch.cat([part.detach() for part in packed.parts]).to(dtype)
            integers = torch.int16 if dtype == torch.bfloat16 else torch.int32
            assert torch.equal(packed.narrow.view(integers), expected.view(integers))
            assert not packed.narrow.requires_grad
    assert len(copied) == 1 + 4 * (not isinstance(optimizer, Lamb)), "the loaded weights"


def test_who_has_use_for_packed_weights(model):
    assert packed_weights.packed_weights(model, CPU, torch.float32) is not None
    assert packed_weights.packed_weights(model, CPU, torch.bfloat16) is None, "in the interpreter"
    wanted.use_fused([])
    assert packed_weights.packed_weights(model, CPU, torch.float32) is None


def adds_nothing(self, grad, first_grad=None):
    return tuple(grad.new_zeros(length) for length in self._lengths)


# A changed copy of the module would register its operations anew, so functions are replaced.
PLANTED = {
    "the memory overwritten": ("add_weight_gradient", lambda grad, x, total, *_: torch.mm(grad.T, x, out=total)),
    "added to NaN": ("add_product", lambda total, left, right, **_: total.addmm_(left, right)),
    "nothing added": ("add_weight_gradient", lambda grad, x, total, *_: None),
    "rows for columns": ("weight_gradient", lambda grad, x: (x.T @ grad).reshape(grad.shape[1], -1)),
    "half of the rows": ("weight_gradient", lambda grad, x: grad[::2].T @ x[::2]),
    "a bias without its memory": ("PackedGradient.of_bias", adds_nothing),
    "a bias's memory overwritten": ("add_row_sums", lambda grad, total, *_: total.copy_(grad.sum(0))),
    "a bias's other rows left out": ("add_row_sums", lambda grad, total, *_: total.add_(grad.sum(0))),
    "means of rows": ("row_sums", lambda grad: grad.mean(0)),
    "other rows left out": ("add_weight_gradient", lambda grad, x, total, *_: total.addmm_(grad.T, x)),
}


def all_of_them():
    for has_memory in (False, True):
        test_results_and_gradients_are_those_of_the_layers(has_memory, True, 2, 2)
    test_a_product_overwrites_what_is_in_memory(None, None, torch.float32)
    test_other_rows_by_the_first_parameter(True)
    test_other_rows_by_the_first_parameter(False)


@pytest.mark.parametrize("name", PLANTED)
def test_planted_bugs_are_found(name, monkeypatch):
    monkeypatch.setattr(f"kernels.linear.{PLANTED[name][0]}", PLANTED[name][1])
    with pytest.raises((AssertionError, RuntimeError)):
        all_of_them()


@pytest.mark.parametrize(
    ("addmm", "expected"),
    [
        (lambda total, left, right, *, out_dtype, out: out.addmm_(left.to(out_dtype), right.to(out_dtype)), True),
        (lambda total, left, right, *, out_dtype, out: out.copy_(left @ right + total.bfloat16()), False),  # rounded
        (lambda total, left, right, *, out_dtype, out: out.copy_(left @ right), False),  # forgotten
        (lambda *_, **__: torch.mm(torch.ones(1, 1), torch.ones(1, 1).double()), False),  # refused
        (lambda total, left, right: None, False),  # not known
    ],
)
def test_products_into_fp32_are_tried_out_on_a_gpu(monkeypatch, addmm, expected):
    """By tensors on the CPU in place of a GPU's."""
    on_cpu = {name: getattr(torch, name) for name in ("ones", "full")}
    for name, function in on_cpu.items():
        monkeypatch.setattr(torch, name, lambda *args, function=function, device, **kwargs: function(*args, **kwargs))
    monkeypatch.setattr(torch, "addmm", addmm)
    mm = torch.mm
    monkeypatch.setattr(
        torch,
        "mm",
        lambda left, right, out_dtype=None, out=None: mm(left, right) if out is None else out.copy_(mm(left, right)),
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert multiplies_into_fp32.__wrapped__(torch.device("cuda")) is expected
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not multiplies_into_fp32.__wrapped__(torch.device("cuda"))
