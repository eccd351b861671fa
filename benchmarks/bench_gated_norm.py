"""The gated LayerNorm of a feed-forward, forward and backward, without matmuls: half the rows of a step."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.measurement import BASELINE, COMPILED, Measurement
from kernels.gated_norm import cpp, eager, fused
from kernels.numerics import Comparison, compare

EPS = 1e-5
Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """B rows of T positions, I elements each."""

    B: int
    T: int
    I: int  # noqa: E741 - the paper's letter

    def __str__(self) -> str:
        return f"B={self.B} T={self.T} I={self.I}"


SHAPES = [Shape(16, 128, 1280), Shape(16, 128, 2560)]
TINY = Shape(1, 3, 24)


def _forward(leaf: Tensor) -> Tensor:
    return eager.gated_norm(*leaf.chunk(2, dim=-1), "tanh", EPS)


def _by_autograd(gate: Tensor, grad: Tensor, forward: Forward = _forward) -> tuple[Tensor, Tensor]:
    """[B, T, 2I] and the result's gradient [B, T, I] to the result [B, T, I] and the gradient of the input."""
    leaf = gate.detach().requires_grad_()
    with torch.autocast(gate.device.type, torch.bfloat16, enabled=gate.dtype == torch.bfloat16):
        normalized = forward(leaf)
    normalized.backward(grad)
    return normalized.detach(), leaf.grad


def _cpp(gate: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    normalized, mean, inverse_std = cpp.gated_norm(gate, None, True, EPS)
    of_gate, _, _ = cpp.gated_norm_backward(grad, gate, None, mean, inverse_std, True)
    return normalized, of_gate


def _triton(gate: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    normalized, mean, inverse_std = fused.gated_norm(gate, None, True, EPS)
    of_gate, _, _ = fused.gated_norm_backward(grad, gate, None, mean, inverse_std, True)
    return normalized, of_gate


IMPLEMENTATIONS = {BASELINE: _by_autograd, COMPILED: _by_autograd, "cpp": _cpp, "triton": _triton}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gated_norm(measurement: Measurement, impl: str, shape: Shape) -> None:
    """In bf16; the kernels' backward also recomputes the result, for the gradient of the following matrix."""
    shape = shape if measurement.enabled else TINY
    gate, grad = make_inputs(shape)
    function = implementation(impl, measurement.compiled)
    measurement.prove(proof(function(gate, grad), gate, grad))
    measurement.time(lambda: function(gate, grad), lambda: _by_autograd(gate, grad))


def implementation(impl: str, compiled: Callable[[Forward], Forward]) -> Callable[[Tensor, Tensor], tuple]:
    """The function to time, with its forward compiled where the name says so."""
    function = IMPLEMENTATIONS[impl]
    return partial(function, forward=compiled(_forward)) if impl == COMPILED else function


def make_inputs(shape: Shape) -> tuple[Tensor, Tensor]:
    """Linear and gate concatenated, and a gradient, in bf16."""
    generator = machine.generator(shape.I)
    sizes = ((shape.B, shape.T, 2 * shape.I), (shape.B, shape.T, shape.I))
    gate, grad = (torch.randn(size, generator=generator, device=generator.device).bfloat16() for size in sizes)
    return gate, grad


def proof(results: tuple[Tensor, Tensor], gate: Tensor, grad: Tensor) -> Iterator[Comparison]:
    """By the tolerance rule."""
    exact = _by_autograd(gate.double(), grad.double())
    for name, *tensors in zip(("normalized", "∂gate"), results, exact, _by_autograd(gate, grad), strict=True):
        yield from compare(name, *tensors)
