"""Softmax of content and position scores, forward and backward, without matmuls: half the rows of a training step."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from benchmarks import machine, peers
from benchmarks.measurement import BASELINE, Measurement
from kernels.attention_context import cpp, eager
from kernels.numerics import Comparison, compare

DROPOUT = 0.1
SEED = torch.tensor([77, -5], dtype=torch.int32)


@dataclass(frozen=True)
class Shape:
    """H heads, B rows, T positions, P position vectors."""

    H: int
    B: int
    T: int
    P: int = 63

    def __str__(self) -> str:
        return f"H={self.H} B={self.B} T={self.T}"


SHAPES = [Shape(6, 16, 128), Shape(6, 4, 512)]
TINY = Shape(2, 1, 9)
Inputs = tuple[Tensor, ...]


def _reference(*inputs: Tensor) -> tuple[Tensor, ...]:
    """Content scores, scores by query and by key, gradient of the probabilities after dropout; buckets and mask."""
    scores, by_query, by_key, grad, buckets, mask, seed = inputs
    weights = eager.attention_weights(scores, by_query, by_key, buckets, mask, seed, DROPOUT)
    num_buckets = by_query.shape[-1]
    return *weights, *eager.attention_weights_backward(grad, weights[0], buckets, num_buckets, seed, DROPOUT)


def _cpp(*inputs: Tensor) -> tuple[Tensor, ...]:
    scores, by_query, by_key, grad, buckets, mask, seed = inputs
    weights = cpp.attention_weights(scores, by_query, by_key, buckets, mask, seed, DROPOUT)
    return *weights, *cpp.attention_weights_backward(grad, weights[0], buckets, by_query.shape[-1], seed, DROPOUT)


IMPLEMENTATIONS = {BASELINE: _reference, "reference_compiled": _reference, "cpp": _cpp}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_context(measurement: Measurement, impl: str, shape: Shape) -> None:
    """Scores to probabilities before and after dropout, forward and backward, in bf16."""
    peers.skip_unless_possible(impl)
    shape = shape if measurement.enabled else TINY
    function = measurement.compile(IMPLEMENTATIONS[impl]) if impl == "reference_compiled" else IMPLEMENTATIONS[impl]
    inputs = make_inputs(shape)
    measurement.prove(proof(function(*inputs), inputs))
    measurement.time(lambda: function(*inputs), None if impl == BASELINE else lambda: _reference(*inputs))


def make_inputs(shape: Shape) -> Inputs:
    """Two documents per row; buckets widen with distance, as in the model."""
    generator = torch.Generator().manual_seed(shape.T)
    heads, batch, length, positions = shape.H, shape.B, shape.T, shape.P
    sizes = (
        *((heads, batch, length, length), (heads, batch, length, positions)),
        *((heads, positions, batch, length), (heads, batch, length, length)),
    )
    tensors = [torch.randn(size, generator=generator).bfloat16() for size in sizes]
    position = torch.arange(length)
    distance = position[:, None] - position[None, :]
    exact = positions // 4
    far = exact + ((distance.abs() - exact).clamp(min=1).float().log2() * 2).long()
    buckets = positions // 2 + torch.where(distance.abs() <= exact, distance, distance.sign() * far)
    documents = (position > length // 3).expand(batch, -1)
    mask = documents[:, :, None] == documents[:, None, :]
    inputs = (*tensors, buckets.clamp(0, positions - 1), mask, SEED)
    return tuple(tensor.to(machine.device()) for tensor in inputs)


def proof(results: tuple[Tensor, ...], inputs: Inputs) -> Iterator[Comparison]:
    """By the tolerance rule; the backward of each implementation starts from its own probabilities."""
    exact = _reference(*(tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs))
    names = ("probabilities", "dropped", "∂scores", "∂by_query", "∂by_key", "dropped again")
    for name, *tensors in zip(names, results, exact, _reference(*inputs), strict=True):
        yield from compare(name, *tensors)
