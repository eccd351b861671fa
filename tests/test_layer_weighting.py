"""Layer weighting against explicit sums, with autograd's derivative."""

import gc

import pytest
import torch

from gptbert.model.layer_weighting import LayerWeighting, Representations
from tests.numerics import close

DEPTH = 5


def sublayer(x, number):
    return torch.sin((number + 1) * x)


@pytest.fixture
def weightings():
    generator = torch.Generator().manual_seed(4)
    modules = [LayerWeighting(number + 2).double() for number in range(DEPTH)]
    for module in modules:
        module.alpha.data += 0.3 * torch.randn(module.alpha.shape, generator=generator, dtype=torch.float64)
    return modules


def ours(first, modules):
    representations = Representations(len(modules) + 1)
    x = representations.start(first)
    for number, module in enumerate(modules):
        x = module(x + sublayer(x, number), representations)
    return x


def plain(first, modules):
    x, seen = first, [first]
    for number, module in enumerate(modules):
        seen.append(x + sublayer(x, number))
        x = sum(alpha * y for alpha, y in zip(module.alpha, seen, strict=True))
    return x


def test_layer_weighting_has_the_plain_sums_values_and_gradients(weightings):
    first = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    inputs = [first, *(module.alpha for module in weightings)]
    results = []
    for function in (ours, plain):
        result = function(first, weightings)
        results.append([result.detach(), *torch.autograd.grad(result.square().sum(), inputs)])
    assert close(*results, tolerance=1e-12)


def test_at_first_the_newest_alone():
    first = torch.randn(2, 3, 4)
    representations = Representations(2)
    representations.start(first)
    newest = torch.randn(2, 3, 4)
    assert torch.equal(LayerWeighting(2)(newest, representations), newest)


def test_a_second_backward_is_refused(weightings):
    result = ours(torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True), weightings).sum()
    result.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a forward has one backward"):
        result.backward()


def test_a_depth_that_does_not_fit_is_an_error():
    representations = Representations(3)
    representations.start(torch.randn(1, 2, 3))
    with pytest.raises(ValueError, match="representation 1 has 3 weights, expected 2"):
        LayerWeighting(3)(torch.randn(1, 2, 3), representations)


def test_autocast_leaves_the_sum_in_fp32():
    first, newest, weighting = torch.randn(2, 3, 4), torch.randn(2, 3, 4), LayerWeighting(2)
    weighting.alpha.data = torch.tensor([1 / 3, 2 / 3])
    with torch.autocast("cpu", torch.bfloat16):
        representations = Representations(2)
        representations.start(first)
        mixed = weighting(newest, representations)
    torch.testing.assert_close(mixed, first / 3 + newest * 2 / 3)


def test_a_loss_that_lives_on_keeps_no_representations(weightings):
    first = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)

    def count():
        gc.collect()
        shapes = (each.shape for each in gc.get_objects() if type(each) is torch.Tensor)
        known = (shape for shape in shapes if all(isinstance(size, int) for size in shape))  # no symbolic sizes
        return sum(shape == (DEPTH + 1, first.numel()) for shape in known)

    loss = ours(first, weightings).sum()
    assert count() == 1
    loss.backward()
    assert count() == 0
    assert loss.grad_fn is not None
