"""The C++ kernels for layer weighting against explicit sums in fp64."""

import pytest
import torch

from kernels.backend import set_default_backend
from kernels.depth_mix import buffer, depth_mix, depth_mix_backward
from kernels.depth_mix.cpp import PIECE
from kernels.numerics import sum_rounding
from tests.numerics import assert_accurate, on_threads, same, scattered

CAPACITY = 5
SIZES = [1, 3, 127, PIECE - 1, PIECE, PIECE + 1, 5 * PIECE + 77]
UNTOUCHED = 55.0


def make_values(rows):
    """Pack [capacity, N] into the kernel's bf16 tiles; unused elements get the marker value UNTOUCHED."""
    size = rows.shape[1]
    values = torch.full((-(-size // PIECE), len(rows), PIECE), UNTOUCHED, dtype=torch.bfloat16)
    for first in range(0, size, PIECE):
        part = rows[:, first : first + PIECE]
        values[first // PIECE, :, : part.shape[1]] = part
    return values


def make_case(size, seed=0):
    """Rows [capacity, N] in bf16; the newest in fp32; weights [capacity, capacity]."""
    generator = torch.Generator().manual_seed(size + seed)
    rows = torch.randn(CAPACITY, size, generator=generator).bfloat16()
    newest = torch.randn(size, generator=generator)
    return rows, newest, torch.randn(CAPACITY, CAPACITY, generator=generator).tril()


def with_row(rows, depth, row):
    """Rows with the one at `depth` replaced, rounded like the others."""
    return torch.cat([rows[:depth], row.bfloat16()[None], rows[depth + 1 :]])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("depth", range(CAPACITY))
def test_a_mix_is_the_sum(size, depth):
    rows, newest, alphas = make_case(size)
    alpha, values = alphas[depth, : depth + 1], make_values(rows)
    mixed = depth_mix(values, newest, alpha)
    exact, plain = (
        alpha[-1].to(dtype) * newest.to(dtype) + alpha[:-1].to(dtype) @ rows[:depth].to(dtype)
        for dtype in (torch.float64, torch.float32)
    )
    assert_accurate(mixed, exact, plain)
    assert torch.equal(values, make_values(with_row(rows, depth, newest)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("depth", range(CAPACITY))
@pytest.mark.parametrize("count", [CAPACITY, CAPACITY - 1])
def test_gradients_are_the_sums(size, depth, count):
    depth = min(depth, count - 1)
    rows, grad, alphas = make_case(size)
    values = make_values(rows)
    of_newest, of_alpha = depth_mix_backward(values, grad, alphas, depth, count)
    exact, plain = (
        [
            alphas[depth, depth].to(dtype) * grad.to(dtype)
            + alphas[depth + 1 : count, depth].to(dtype) @ rows[depth + 1 : count].to(dtype),
            rows[: depth + 1].to(dtype) @ grad.to(dtype),
        ]
        for dtype in (torch.float64, torch.float32)
    )
    assert_accurate(of_newest, exact[0], plain[0], name="newest")
    terms = rows[: depth + 1].double() * grad.double()
    assert_accurate(of_alpha, exact[1], plain[1], name="alpha", rounding=sum_rounding(terms))
    assert torch.equal(values, make_values(with_row(rows, depth, grad)))


@pytest.mark.parametrize("depth", range(CAPACITY))
def test_the_newest_takes_part_in_full_precision(depth):
    rows, newest, _ = make_case(2 * PIECE + 5)
    assert not torch.equal(newest, newest.bfloat16().float())
    only = torch.eye(CAPACITY)
    assert torch.equal(depth_mix(make_values(rows), newest, only[depth, : depth + 1]), newest)
    assert torch.equal(depth_mix_backward(make_values(rows), newest, only, depth, CAPACITY)[0], newest)


def test_a_pass_forward_and_back_over_all_depths():
    """x_n and the gradients of Σ x_n·c_n with respect to all y_n and α_n; only older representations are rounded."""
    size = PIECE + 300
    _, _, alphas = make_case(size)
    generator = torch.Generator().manual_seed(2)
    newest, grads = (torch.randn(CAPACITY, size, generator=generator) for _ in range(2))
    values = torch.empty(2, CAPACITY, PIECE, dtype=torch.bfloat16)
    mixed = [depth_mix(values, newest[n], alphas[n, : n + 1]) for n in range(CAPACITY)]
    gradients = [depth_mix_backward(values, grads[n], alphas, n, CAPACITY) for n in reversed(range(CAPACITY))][::-1]

    y, weights = newest.double().requires_grad_(), alphas.double().requires_grad_()
    exact = weights @ y
    of_y, of_weights = torch.autograd.grad((exact * grads).sum(), (y, weights))
    rounding = {"rtol": 0, "atol": 0.05}  # a few roundings of 2⁻⁹ relative, of elements up to 4
    torch.testing.assert_close(torch.stack(mixed).double(), exact, **rounding)
    torch.testing.assert_close(torch.stack([gradient for gradient, _ in gradients]).double(), of_y, **rounding)
    for n, (_, of_alpha) in enumerate(gradients):
        torch.testing.assert_close(of_alpha.double(), of_weights[n, : n + 1], rtol=0, atol=0.5)


def test_what_is_not_a_number_stays_in_its_place():
    rows, newest, alphas = make_case(2 * PIECE)
    rows[1, 7] = newest[PIECE + 3] = torch.nan
    mixed = depth_mix(make_values(rows), newest, alphas[3, :4])
    assert mixed.isnan().nonzero().flatten().tolist() == [7, PIECE + 3]
    of_newest, of_alpha = depth_mix_backward(make_values(rows), newest.nan_to_num(), alphas, 3, CAPACITY)
    assert of_newest.isfinite().all()
    assert of_alpha.isnan().tolist() == [False, True, False, False]
    of_newest, of_alpha = depth_mix_backward(make_values(rows), newest, alphas, 0, CAPACITY)
    assert of_newest.isnan().nonzero().flatten().tolist() == [7, PIECE + 3]
    assert of_alpha.isnan().all()


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7F800001, -1])
def test_whatever_its_bits_it_is_kept_as_no_number(bits):
    values, newest = make_values(torch.zeros(CAPACITY, 3).bfloat16()), torch.full((3,), bits, dtype=torch.int32)
    depth_mix(values, newest.view(torch.float32), torch.ones(1))
    assert values[0, 0, :3].isnan().all()


@pytest.mark.parametrize("size", [3, 5 * PIECE + 77])
def test_two_calls_and_two_threads_give_the_same_bits(size):
    """Except ∂/∂α, which sums a part per thread: bitwise equal for the same number of threads only."""
    rows, newest, alphas = make_case(size)

    def forward():
        return [depth_mix(make_values(rows), newest, alphas[3, :4])]

    def backward():
        return depth_mix_backward(make_values(rows), newest, alphas, 2, CAPACITY)

    assert same(on_threads(1, forward), on_threads(1, forward))
    assert same(on_threads(1, forward), on_threads(2, forward))
    for threads in (1, 2, 3):
        assert same(on_threads(threads, backward), on_threads(threads, backward))
        assert torch.equal(on_threads(threads, backward)[0], on_threads(1, backward)[0])
        torch.testing.assert_close(on_threads(threads, backward)[1], on_threads(1, backward)[1])


def test_shapes_and_memory_that_is_not_contiguous():
    rows, newest, alphas = make_case(3 * 4 * 100)
    alpha = alphas[2, :3]
    expected = depth_mix(make_values(rows), newest, alpha)
    gradients = depth_mix_backward(make_values(rows), newest, alphas, 2, CAPACITY)
    for strided in (scattered(newest.view(3, 4, 100)), newest.view(3, 4, 100).mT.contiguous().mT):
        mixed = depth_mix(make_values(rows), strided, scattered(alpha))
        of_newest, of_alpha = depth_mix_backward(make_values(rows), strided, alphas, 2, CAPACITY)
        assert same(
            [mixed, of_newest, of_alpha], [expected.view(3, 4, 100), gradients[0].view(3, 4, 100), gradients[1]]
        )


@pytest.mark.parametrize("size", [1, PIECE, PIECE + 1])
@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_the_buffer_is_narrow_where_cpp_kernels_take_mixed_precision(size, backend):
    like = torch.empty(1, size)
    for choose, given in ((None, backend), (backend, None)):
        set_default_backend(choose)
        assert buffer(3, like, backend=given).shape == (3, size)
        with torch.autocast("cpu", torch.bfloat16):
            values = buffer(3, like, backend=given)
            assert buffer(3, like.double(), backend=given).shape == (3, size)
        narrow = backend == "cpp"
        assert values.shape == ((-(-size // PIECE), 3, PIECE) if narrow else (3, size))
        assert values.dtype == (torch.bfloat16 if narrow else torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_kernels_refuse_what_they_would_read_as_fp32(dtype):
    values, newest = torch.zeros(1, 3, PIECE, dtype=torch.bfloat16), torch.zeros(9, dtype=dtype)
    with pytest.raises(TypeError, match=f"a buffer of torch.bfloat16 on cpu takes fp32 on a CPU, not {dtype}"):
        depth_mix(values, newest, torch.ones(1))
    with pytest.raises(TypeError, match="takes fp32 on a CPU"):
        depth_mix_backward(values, newest, torch.ones(3, 3), 0, 1)


def test_the_first_mix_has_a_weight_too():
    newest = torch.arange(1.0, 6.0)
    assert torch.equal(depth_mix(torch.empty(2, 5), newest, torch.tensor([0.5])), newest / 2)
