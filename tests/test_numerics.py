"""The rule by which kernels pass: what it allows, what it rejects, and what it refuses to judge."""

import math

import pytest
import torch

from kernels.numerics import (
    FACTOR,
    FLOOR,
    compare,
    compare_all,
    compare_exactly,
    compare_function,
    relative_error,
    sum_rounding,
)

EPS = torch.finfo(torch.float32).eps
REFERENCE = torch.tensor([-8.0, 0.5, -0.25], dtype=torch.float64)


def off_by(error):
    """In fp32, the second entry of the reference changed."""
    return (REFERENCE + torch.tensor([0.0, error, 0.0])).float()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("of_plain", [0.0, 2**-10, -(2**-10)])
@pytest.mark.parametrize("rounding", [0.0, 2**-9])
def test_an_error_may_be_a_multiple_of_plain_pytorchs_and_a_few_roundings(sign, of_plain, rounding):
    allowed = FACTOR * abs(of_plain) + FLOOR * EPS * 8 + rounding
    for share, passes in ((0.99, True), (1.01, False)):
        actual = off_by(sign * share * allowed)
        (result,) = compare("tensor", actual, REFERENCE, off_by(of_plain), rounding=rounding)
        assert result.bound == pytest.approx(allowed)
        assert result.error == pytest.approx(share * allowed, rel=1e-2)
        assert result.passed == passes


def test_the_rule_is_three_errors_and_four_roundings():
    assert (FACTOR, FLOOR) == (3, 4)
    narrow = torch.ones(2, dtype=torch.bfloat16)
    (result,) = compare("tensor", narrow, narrow.double(), narrow)
    assert result.bound == 4 * 2**-7, "of the result's dtype"


def test_small_entries_have_a_floor_of_their_own():
    off_target = torch.tensor([False, True, True])
    actual = off_by(3 * EPS)  # less than four roundings of 8, more than of 1/2
    assert [result.passed for result in compare("tensor", actual, REFERENCE, off_by(0.0))] == [True]
    results = compare("tensor", actual, REFERENCE, off_by(0.0), off_target)
    assert [(result.name, result.passed) for result in results] == [("tensor", True), ("tensor off target", False)]
    everything = compare("tensor", actual, REFERENCE, off_by(0.0), torch.ones(3, dtype=torch.bool))
    assert [result.name for result in everything] == ["tensor off target"], "no group without entries"


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_never_passes(wrong):
    actual = off_by(wrong)
    (result,) = compare("tensor", actual, REFERENCE, off_by(1.0))
    assert not result.passed
    assert relative_error(actual, REFERENCE) == math.inf
    assert relative_error(off_by(2.0), REFERENCE) == 2 / 8
    with pytest.raises(AssertionError, match="finite"):
        compare("tensor", actual, actual.double(), actual)  # infinities on all sides would be within their bound


@pytest.mark.parametrize(
    "tensors",
    [
        (torch.ones(3), torch.ones(3), torch.ones(3)),
        (torch.ones(3), torch.ones(3).double(), torch.ones(3).bfloat16()),
        (torch.ones(3).double(), torch.ones(3).double(), torch.ones(3)),
        (torch.ones(1), torch.ones(3).double(), torch.ones(3)),
        (torch.ones(3), torch.ones(1).double(), torch.ones(3)),
        (torch.ones(3), torch.ones(3).double(), torch.ones(1)),
    ],
    ids=["reference in fp32", "narrower", "wider", "shape", "reference's shape", "plain's shape"],
)
def test_other_types_and_shapes_are_not_compared(tensors):
    with pytest.raises(AssertionError, match="tensor: "):
        compare("tensor", *tensors)


def test_several_tensors_are_compared_by_name():
    right, wrong = off_by(0.0), off_by(1.0)
    results = list(compare_all("a, b", [right, wrong], [REFERENCE] * 2, [right] * 2))
    assert [(result.name, result.passed) for result in results] == [("a", True), ("b", False)]
    with pytest.raises(ValueError, match="zip"):
        list(compare_all("a, b", [right], [REFERENCE], [right]))


def test_an_exact_comparison_counts_what_differs():
    expected = torch.tensor([1, 2, 3])
    assert compare_exactly("ids", expected, expected).passed
    result = compare_exactly("ids", torch.tensor([1, 3, 2]), expected)
    assert (result.error, result.bound, result.passed) == (2, 0, False)
    nan = torch.tensor([math.nan])
    assert not compare_exactly("NaN", nan, nan).passed
    for other in (expected.int(), expected[:1]):
        with pytest.raises(AssertionError, match="ids: "):
            compare_exactly("ids", other, expected)


def test_a_function_is_compared_with_all_its_gradients():
    inputs = {"x": torch.tensor([3.0, -2.0]), "y": torch.tensor([0.5, 4.0])}

    class Wrong(torch.autograd.Function):
        """x·y, with the gradient of x once more for y."""

        @staticmethod
        def forward(ctx, x, y):
            ctx.save_for_backward(x, y)
            return x * y

        @staticmethod
        def backward(ctx, grad):
            _, y = ctx.saved_tensors
            return grad * y, grad * y

    def product(x, y):
        return x * y

    def wrong(x, y):
        return Wrong.apply(x, y)

    results = compare_function("product", wrong, product, inputs)
    verdicts = {result.name: result.passed for result in results}
    assert verdicts == {"product: result": True, "product: ∂x": True, "product: ∂y": False}
    assert all(result.passed for result in compare_function("product", product, product, inputs))
    rounded = {name: tensor.bfloat16() for name, tensor in inputs.items()}
    lax = list(compare_function("product", lambda x, y: x * y * 1.125, product, rounded, lambda x, y: x * y * 1.0625))
    assert all(result.passed for result in lax), "plain PyTorch is what is given as such"


def test_a_function_may_write_over_its_inputs():
    def doubled(x):
        result = 2 * x
        x.detach().zero_()
        return result

    inputs = {"x": torch.arange(4.0)}
    assert all(result.passed for result in compare_function("doubled", doubled, lambda x: 2 * x, inputs))
    assert inputs["x"].tolist() == [0, 1, 2, 3]


def test_the_gradient_that_comes_in_is_not_the_same_everywhere():
    def wrong(x):  # where it were the same everywhere, so would be the gradient of x
        return x.detach() + (x.sum() - x.detach().sum()) / len(x)

    inputs = {"x": torch.arange(4.0)}
    assert [result.passed for result in compare_function("sum", wrong, lambda x: x * 1, inputs)] == [True, False]


def test_rounding_of_a_sum():
    terms = torch.tensor([[3.0, -4.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    assert sum_rounding(terms) == 2 * 2**-24 * 8


def test_nothing_has_no_error():
    empty = torch.empty(0)
    assert compare_exactly("empty", empty, empty).passed
    assert compare("empty", empty, empty.double(), empty) == []
    assert relative_error(empty, empty) == 0
