"""The gated product's C++ kernels against the formula in fp64 and autograd's derivative of it."""

import pytest
import torch
import torch.nn.functional as F

from kernels.gated_norm.cpp import gated_norm, gated_norm_backward
from tests.numerics import assert_accurate, on_threads, same, scattered

EPS = 1e-5
GELUS = pytest.mark.parametrize("is_tanh", [False, True], ids=["exact", "tanh"])
SEPARATE = pytest.mark.parametrize("separate", [False, True], ids=["one matrix", "separate linear"])


def make_case(batch, length, heads, width, *, separate, size=1.0):
    """Gate, linear or None, and a gradient; with a separate linear, the gate is the second half of a wider tensor."""
    generator = torch.Generator().manual_seed(length + width)
    both = size * torch.randn(batch, length, 2 * heads * width, generator=generator)
    linear = 0.3 + torch.randn(heads, batch, length, width, generator=generator)
    grad = torch.randn(batch, length, heads * width, generator=generator)
    both = both.bfloat16()
    gate = both.chunk(2, dim=-1)[1] if separate else both
    return gate, linear.bfloat16() if separate else None, grad.bfloat16()


def formula(gate, linear, is_tanh):
    """Normalized product, mean and inverse standard deviation."""
    if linear is None:
        linear, gate = gate.chunk(2, dim=-1)
    else:
        linear = linear.permute(1, 2, 0, 3).flatten(2)
    product = linear * F.gelu(gate, approximate="tanh" if is_tanh else "none")
    inverse_std = (product.var(dim=-1, correction=0) + EPS).rsqrt()
    return F.layer_norm(product, product.shape[-1:], eps=EPS), product.mean(dim=-1), inverse_std


def expected(case, is_tanh, dtype):
    """Results and gradients in one dtype: of the gate, and of the linear if there is one."""
    gate, linear, grad = (None if tensor is None else tensor.detach().to(dtype) for tensor in case)
    inputs = [tensor.requires_grad_() for tensor in (gate, linear) if tensor is not None]
    results = formula(gate, linear, is_tanh)
    return [tensor.detach() for tensor in results], torch.autograd.grad(results[0], inputs, grad)


def check(case, is_tanh):
    gate, linear, grad = case
    results = gated_norm(gate, linear, is_tanh, EPS)
    (exact, exact_gradients), (plain, plain_gradients) = (
        expected(case, is_tanh, dtype) for dtype in (torch.float64, torch.float32)
    )
    assert_accurate(results[0], exact[0], plain[0].bfloat16(), name="normalized")
    for actual, *pair, name in zip(results[1:], exact[1:], plain[1:], ("mean", "inverse_std"), strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double() * exact[2], pair[0] * exact[2], atol=3e-6, rtol=3e-6, msg=name)
    *gradients, again = gated_norm_backward(grad, gate, linear, *results[1:], is_tanh)
    assert_accurate(again, exact[0], plain[0].bfloat16(), name="normalized again")
    if linear is None:
        assert gradients.pop().shape == (0,)
    for actual, *pair in zip(gradients, exact_gradients, plain_gradients, strict=True):
        assert_accurate(actual, pair[0], pair[1].bfloat16(), name="gradient")


@GELUS
@SEPARATE
@pytest.mark.parametrize("length", [1, 2, 3, 16, 17, 45, 128])
@pytest.mark.parametrize(("batch", "heads", "width"), [(1, 1, 16), (3, 6, 7), (1, 6, 33), (3, 5, 1), (3, 1, 131)])
def test_results_and_gradients_are_as_accurate_as_pytorch(is_tanh, separate, length, batch, heads, width):
    check(make_case(batch, length, heads, width, separate=separate), is_tanh)


@GELUS
@SEPARATE
@pytest.mark.parametrize("size", [1e-3, 30.0, 4000.0])
def test_gates_of_any_size(is_tanh, separate, size):
    check(make_case(2, 9, 3, 20, separate=separate, size=size), is_tanh)


@GELUS
def test_the_activation_of_every_gate_in_bf16(is_tanh):
    """With one element per row, the mean is the product itself, in fp32."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    gates = every[every.abs() <= 1e4].view(1, -1, 1)
    _, mean, _ = gated_norm(gates, torch.ones(1, *gates.shape, dtype=torch.bfloat16), is_tanh, EPS)
    exact = F.gelu(gates.double(), approximate="tanh" if is_tanh else "none")[..., 0]
    assert ((mean - exact).abs() <= 3e-7 * gates[..., 0].double().abs()).all()


@GELUS
def test_the_slope_where_it_is_almost_zero(is_tanh):
    """There GELU's tanh approximation differs by more than a bf16 rounding."""
    gate, linear, grad = make_case(2, 9, 3, 20, separate=True)
    check((torch.full_like(gate, -0.75), linear, grad), is_tanh)


@GELUS
@SEPARATE
def test_what_is_not_a_number_stays_none_in_its_row_alone(is_tanh, separate):
    gate, linear, grad = make_case(2, 5, 3, 7, separate=separate)
    before = gated_norm(gate, linear, is_tanh, EPS)
    *gradients, _ = gated_norm_backward(grad, gate, linear, *before[1:], is_tanh)
    gate[1, 2, -1] = torch.nan
    after = gated_norm(gate, linear, is_tanh, EPS)
    *after_gradients, _ = gated_norm_backward(grad, gate, linear, *after[1:], is_tanh)
    rows = torch.ones(2, 5, dtype=torch.bool)
    rows[1, 2] = False
    assert all(tensor[1, 2].isnan().all() for tensor in (*after, after_gradients[0]))
    pairs = [*zip(after, before, strict=True), (after_gradients[0], gradients[0])]
    assert all(torch.equal(left[rows], right[rows]) for left, right in pairs)
    if separate:
        assert after_gradients[1][:, 1, 2].isnan().all()
        assert torch.equal(after_gradients[1][:, rows], gradients[1][:, rows])


@GELUS
@SEPARATE
def test_two_calls_and_two_threads_give_the_same_bits(is_tanh, separate):
    gate, linear, grad = make_case(3, 37, 3, 21, separate=separate)
    forward = gated_norm, gate, linear, is_tanh, EPS
    results = on_threads(1, *forward)
    backward = gated_norm_backward, grad, gate, linear, *results[1:], is_tanh
    for call in (forward, backward):
        first = on_threads(1, *call)
        assert same(on_threads(1, *call), first)
        assert same(on_threads(2, *call), first)


LAYOUTS = {
    "as it is": torch.Tensor.contiguous,
    "apart": scattered,
    "rows first": lambda tensor: tensor.transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(0, 1),
    "longer": lambda tensor: torch.cat([tensor, tensor.flip(1)], dim=1)[:, : tensor.shape[1]],
    "wider": lambda tensor: torch.cat([tensor.flip(2), tensor], dim=2)[:, :, tensor.shape[2] :],
}


@SEPARATE
@pytest.mark.parametrize(("batch", "length"), [(3, 5), (1, 5), (3, 1), (1, 1)])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_memory_that_is_not_contiguous(separate, batch, length, layout):
    """Also if a dimension of size 1 has an arbitrary stride, which PyTorch calls contiguous."""
    gate, linear, grad = make_case(batch, length, 3, 8, separate=separate)
    first = gated_norm(gate.contiguous(), linear, True, EPS)
    gradients = gated_norm_backward(grad, gate.contiguous(), linear, *first[1:], True)
    for strided in (None,) if linear is None else (linear, scattered(linear), linear.mT.contiguous().mT):
        assert same(gated_norm(layout(gate), strided, True, EPS), first)
        assert same(gated_norm_backward(layout(grad), layout(gate), strided, *first[1:], True), gradients)


@SEPARATE
def test_are_well_made_operations(separate):
    gate, linear, grad = make_case(2, 3, 2, 5, separate=separate)
    torch.library.opcheck(gated_norm, (gate, linear, True, EPS))
    torch.library.opcheck(gated_norm_backward, (grad, gate, linear, *gated_norm(gate, linear, True, EPS)[1:], True))
