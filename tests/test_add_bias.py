"""The C++ kernel's row sums against fp64, and the bias gradient that uses them."""

import pytest
import torch

from kernels.add_bias import add_bias
from kernels.add_bias.cpp import column_sums
from tests.numerics import assert_accurate, on_threads, same, scattered


def make_rows(rows, columns):
    generator = torch.Generator().manual_seed(rows + columns)
    return torch.randn(rows, columns, generator=generator).bfloat16()


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 16, 17, 45, 127, 128, 3001])
@pytest.mark.parametrize("columns", [1, 2, 15, 16, 17, 127, 128, 129, 300])
def test_sums_are_as_accurate_as_pytorch(rows, columns):
    x = make_rows(rows, columns)
    assert_accurate(column_sums(x), x.double().sum(dim=0), x.float().sum(dim=0))


def test_sums_are_of_fp32():
    """Sums must accumulate in fp32: in bf16 a sum of ones stops growing at 256."""
    assert column_sums(torch.ones(4097, 3, dtype=torch.bfloat16)).tolist() == [4097.0] * 3


@pytest.mark.parametrize("content", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_column(content):
    x = make_rows(45, 150)
    before = column_sums(x)
    x[44, 149] = x[3, 0] = content
    after = column_sums(x)
    torch.testing.assert_close(after[[0, 149]], torch.full((2,), content), equal_nan=True)
    assert torch.equal(after[1:149], before[1:149])


@pytest.mark.parametrize("columns", [17, 1000])
def test_two_calls_and_two_threads_give_the_same_bits(columns):
    x = make_rows(127, columns)
    first = on_threads(1, column_sums, x)
    assert torch.equal(on_threads(1, column_sums, x), first)
    assert torch.equal(on_threads(2, column_sums, x), first)


@pytest.mark.parametrize(("rows", "columns"), [(17, 33), (1, 33), (17, 1), (1, 1)])
def test_memory_that_is_not_contiguous(rows, columns):
    x = make_rows(rows, columns)
    expected = column_sums(x)
    wider = torch.full((rows, columns + 9), torch.nan, dtype=x.dtype)
    wider[:, 5 : columns + 5] = x
    longer = torch.stack([x, torch.full_like(x, torch.nan)], dim=1)
    for strided in (wider[:, 5 : columns + 5], longer[:, 0], x.T.contiguous().T, scattered(x), scattered(x.T).T):
        assert torch.equal(column_sums(strided), expected)
    one = x[:1].expand(rows, columns)
    assert torch.equal(column_sums(one), column_sums(one.contiguous()))


def test_is_a_well_made_operation():
    torch.library.opcheck(column_sums, (make_rows(7, 9),))
    torch.library.opcheck(column_sums, (make_rows(7, 9).T,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_and_its_gradient(dtype):
    product, bias = make_rows(6 * 7, 20).view(6, 7, 20), make_rows(1, 20)[0].to(dtype).requires_grad_()
    product.requires_grad_()
    grad = make_rows(42, 20).flip(0).view(6, 7, 20)
    plain = add_bias(product, bias)
    kernel = add_bias(product, bias, backend="cpp")
    assert torch.equal(plain, kernel)
    of_product, of_bias = torch.autograd.grad(kernel, (product, bias), grad)
    assert same([of_product], torch.autograd.grad(plain, [product], grad))
    assert of_bias.dtype == dtype
    assert torch.equal(of_bias, of_bias.bfloat16().to(dtype)), "rounded, see op.py"
    exact = grad.double().sum(dim=(0, 1))
    assert_accurate(of_bias.bfloat16(), exact, grad.float().sum(dim=(0, 1)).bfloat16())
