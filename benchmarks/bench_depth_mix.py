"""All depth-weighted averages of a forward and its backward: alone, and with what surrounds them in the model."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.measurement import BASELINE, Measurement
from gptbert.model.layer_weighting import LayerWeighting, Representations
from kernels.add_bias import add_bias
from kernels.depth_mix import FusedMixes, buffer, check, depth_mix, depth_mix_backward, reference
from kernels.dropout import dropout
from kernels.normalize import normalize
from kernels.numerics import Comparison

GRAD = 0.1  # of every mix


@dataclass(frozen=True)
class Shape:
    """L mixes of representations of N elements each."""

    L: int
    N: int

    def __str__(self) -> str:
        return f"L={self.L} N={self.N}"


SHAPES = [Shape(13, 2048 * 384), Shape(25, 2048 * 384)]
TINY = Shape(3, 50)
Inputs = tuple[list[Tensor], Tensor]


def _reference(values: list[Tensor], alphas: Tensor) -> list[Tensor]:
    """Autograd's own: gradients of all representations and of the weights."""
    leaves, weights = [value.detach().requires_grad_() for value in values], alphas.detach().requires_grad_()
    total = sum(reference.depth_mix(leaves[: n + 1], weights[n, : n + 1]).sum() for n in range(len(leaves)))
    return list(torch.autograd.grad(GRAD * total, [*leaves, weights]))


def _ours(values: list[Tensor], alphas: Tensor, backend: str) -> list[Tensor]:
    count = len(values)
    with torch.autocast(machine.device().type, torch.bfloat16):
        memory = buffer(count, values[0], backend=backend)
    for n, value in enumerate(values):
        mixed = depth_mix(memory, value, alphas[n, : n + 1])
    grad = torch.full_like(mixed, GRAD)
    return [part for n in reversed(range(count)) for part in depth_mix_backward(memory, grad, alphas, n, count)]


IMPLEMENTATIONS = (BASELINE, "torch", "cpp")


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_depth_mix(measurement: Measurement, impl: str, shape: Shape) -> None:
    """Representations in fp32; the buffer of C++ kernels holds the older ones in bf16."""
    inputs = make_inputs(shape if measurement.enabled else TINY)
    function = _reference if impl == BASELINE else functools.partial(_ours, backend=impl)
    # by the check before a run, in which the reference is what others are compared with
    measurement.prove(check.comparisons(torch.device("cpu"), "torch" if impl == BASELINE else impl))
    measurement.time(lambda: function(*inputs), lambda: _reference(*inputs))


def make_inputs(shape: Shape) -> Inputs:
    """Representations, and weights in a lower triangle."""
    generator = machine.generator(shape.L)
    randn = functools.partial(torch.randn, generator=generator, device=generator.device)
    return [randn(shape.N) for _ in range(shape.L)], randn(shape.L, shape.L).tril()


class Whole(NamedTuple):
    """M mixes of R rows of D."""

    R: int
    D: int
    M: int

    def __str__(self) -> str:
        return f"R={self.R} D={self.D} M={self.M}"


WHOLE = [Whole(4096, 384, 24)]
TINY_WHOLE = Whole(5, 16, 3)
EPS, DROPOUT = 1e-5, 0.1


class WholeInputs(NamedTuple):
    """y_0 [R, D], each mix's weights, one bias [D] and one seed of dropout."""

    first: Tensor
    weightings: list[LayerWeighting]
    bias: Tensor
    seed: Tensor


def _fused(inputs: WholeInputs) -> Tensor:
    mixes = FusedMixes([weighting.alpha for weighting in inputs.weightings], _dtype(), DROPOUT, EPS)
    x, normalized = mixes.start(inputs.first)
    for _ in inputs.weightings:
        x, normalized = mixes.mix(normalized, inputs.bias, x, inputs.seed)
    return x


def _dtype() -> torch.dtype:
    """Of outputs; products in bf16 are wrong in Triton's interpreter."""
    return torch.bfloat16 if machine.device().type == "cuda" else torch.float32


def _unfused(inputs: WholeInputs) -> Tensor:
    with torch.autocast(machine.device().type, torch.bfloat16):
        representations = Representations(len(inputs.weightings) + 1)
        x = representations.start(inputs.first)
        for weighting in inputs.weightings:
            output = dropout(add_bias(normalize(x, EPS), inputs.bias), inputs.seed, DROPOUT)
            x = weighting(x + output, representations)
    return x


WHOLE_IMPLEMENTATIONS = {"triton": _fused, BASELINE: _unfused}


@pytest.mark.parametrize("impl", WHOLE_IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", WHOLE, ids=str)
def test_whole_mixes(measurement: Measurement, impl: str, shape: Whole) -> None:
    """Sub-layers that are the identity: bias, dropout, residual connection, mix and LayerNorm, and their backward."""
    shape = shape if measurement.enabled else TINY_WHOLE
    inputs, function = make_whole_inputs(shape), WHOLE_IMPLEMENTATIONS[impl]
    measurement.prove(whole_proof(impl, shape))
    measurement.time(lambda: whole_gradients(function, inputs), lambda: whole_gradients(_unfused, inputs))


def make_whole_inputs(shape: Whole) -> WholeInputs:
    """Weights that are not those at the start."""
    torch.manual_seed(shape.M)
    weightings = [LayerWeighting(depth + 1) for depth in range(1, shape.M + 1)]
    for weighting in weightings:
        weighting.alpha.data += torch.randn_like(weighting.alpha) / len(weighting.alpha)
        weighting.to(machine.device())
    first, bias = torch.randn(shape.R, shape.D), torch.randn(shape.D)
    tensors = [tensor.to(machine.device()).requires_grad_() for tensor in (first, bias)]
    return WholeInputs(tensors[0], weightings, tensors[1], torch.tensor([1, 2], dtype=torch.int32).to(machine.device()))


def whole_gradients(function: Callable[[WholeInputs], Tensor], inputs: WholeInputs) -> tuple[Tensor, ...]:
    """The last x's sum, differentiated by all inputs."""
    weights = [weighting.alpha for weighting in inputs.weightings]
    return torch.autograd.grad(function(inputs).sum(), [inputs.first, inputs.bias, *weights])


def whole_proof(impl: str, shape: Whole) -> Iterator[Comparison]:
    """The operation's check at this shape; the other implementation is proven apart."""
    if impl == "triton":
        yield from check.compare_fused(machine.device(), min(shape.R, 300), shape.D, shape.M, _dtype())
    else:
        yield from check.comparisons(torch.device("cpu"), "torch")
