"""LayerNorm before matrix products: fp32 arithmetic, bf16 output and few saved activations under autocast."""

import pytest
import torch
import torch.nn.functional as F

from gptbert.model.norm import InputNorm
from tests.conftest import TINY
from tests.numerics import assert_accurate

SHAPE = (5, 7, 24)


def make_inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    x, grad = (torch.randn(SHAPE, generator=generator) for _ in range(2))
    return (3 * x + 100).to(dtype).requires_grad_(), grad.to(torch.bfloat16)  # a large mean: var = E[x²] − E[x]² fails


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_value_and_gradient_are_as_good_as_pytorchs(dtype):
    x, grad = make_inputs(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        ours = InputNorm(TINY.layer_norm_eps)(x)
        plain = F.layer_norm(x, SHAPE[-1:], eps=TINY.layer_norm_eps).to(torch.bfloat16)
    assert ours.dtype == torch.bfloat16
    exact = x.detach().double().requires_grad_()
    reference = F.layer_norm(exact, SHAPE[-1:], eps=TINY.layer_norm_eps)
    assert_accurate(ours, reference, plain)
    gradients = [
        torch.autograd.grad(result, at, grad.to(result.dtype))[0]
        for result, at in ((ours, x), (reference, exact), (plain, x))
    ]
    assert gradients[0].dtype == x.dtype
    # the backward reads the rounded result, so its error is of bf16 too
    assert_accurate(gradients[0].bfloat16(), gradients[1], gradients[2].bfloat16())


def test_without_autocast_it_is_pytorchs():
    x, _ = make_inputs()
    assert torch.equal(InputNorm(TINY.layer_norm_eps)(x), F.layer_norm(x, SHAPE[-1:], eps=TINY.layer_norm_eps))


def test_the_input_is_not_kept():
    x, _ = make_inputs()
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        InputNorm(TINY.layer_norm_eps)(x)
    assert sum(tensor.nbytes for tensor in kept) == 2 * x.numel() + 4 * x.numel() // SHAPE[-1]
