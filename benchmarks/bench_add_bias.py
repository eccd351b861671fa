"""A bias outside its product, forward and backward: an addition, and a sum over rows for the gradient."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.measurement import BASELINE, COMPILED, Measurement
from kernels.add_bias import add_bias, reference
from kernels.numerics import compare_function

AddBias = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """N rows of D elements."""

    N: int
    D: int

    def __str__(self) -> str:
        return f"N={self.N} D={self.D}"


SHAPES = [Shape(2048, 768), Shape(2048, 2560)]
TINY = Shape(5, 24)
IMPLEMENTATIONS = {
    BASELINE: reference.add_bias,
    COMPILED: reference.add_bias,
    "cpp": partial(add_bias, backend="cpp"),
}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_bias(measurement: Measurement, impl: str, shape: Shape) -> None:
    """Both gradients too, in bf16, the bias in fp32."""
    product, bias, _ = inputs = make_inputs(shape if measurement.enabled else TINY)
    function = measurement.compiled(IMPLEMENTATIONS[impl])
    measurement.prove(compare_function("bf16", function, reference.add_bias, {"product": product, "bias": bias}))
    measurement.time(lambda: gradients(function, *inputs), lambda: gradients(reference.add_bias, *inputs))


def make_inputs(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Product, bias, and the gradient of the result."""
    generator = torch.Generator().manual_seed(shape.D)
    product, grad = (torch.randn(shape.N, shape.D, generator=generator).bfloat16() for _ in range(2))
    bias = torch.randn(shape.D, generator=generator)
    product, bias, grad = (tensor.to(machine.device()) for tensor in (product, bias, grad))
    return product.requires_grad_(), bias.requires_grad_(), grad


def gradients(function: AddBias, product: Tensor, bias: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Of the product and of the bias."""
    return torch.autograd.grad(function(product, bias), (product, bias), grad)
