"""Attention, forward and backward: the softmax between its matmuls, and as a whole, fused or not.

The softmax: half the rows of a training step. The whole: from what the projections leave to the context.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.measurement import BASELINE, COMPILED, Measurement
from kernels.attention_context import attention_context, check, cpp, eager, fused_attention, reference
from kernels.attention_context.fused import distance_tables
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


IMPLEMENTATIONS = {BASELINE: _reference, COMPILED: _reference, "cpp": _cpp}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_context(measurement: Measurement, impl: str, shape: Shape) -> None:
    """Scores to probabilities before and after dropout, forward and backward, in bf16."""
    shape = shape if measurement.enabled else TINY
    function = measurement.compiled(IMPLEMENTATIONS[impl])
    inputs = make_inputs(shape)
    measurement.prove(proof(function(*inputs), inputs))
    measurement.time(lambda: function(*inputs), lambda: _reference(*inputs))


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


class Whole(NamedTuple):
    """B rows, T positions, H heads of d, P position vectors."""

    B: int
    T: int
    H: int
    d: int = 64
    P: int = 64

    def __str__(self) -> str:
        return f"B={self.B} T={self.T} H={self.H} d={self.d}"


WHOLE = [Whole(32, 128, 6), Whole(4, 512, 6)]
TINY_WHOLE = Whole(1, 16, 1, 32, 32)


class WholeInputs(NamedTuple):
    """[B, T, 2D] queries and keys, values and gates; [P, 2D] position vectors; buckets [2T − 1]; [B, T] documents."""

    query_key: Tensor
    value_gate: Tensor
    vectors: Tensor
    buckets: Tensor
    document_ids: Tensor
    num_heads: int

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Query, key, position_query, position_key, value."""
        value = self.value_gate[..., : self.value_gate.shape[-1] // 2]
        return *self.query_key.chunk(2, -1), *self.vectors.chunk(2, -1), value

    @property
    def rest(self) -> tuple[Tensor, Tensor, Tensor, float]:
        """Documents, no causal row, seed and probability of dropout."""
        is_causal = torch.zeros_like(self.document_ids[:, 0], dtype=torch.bool)
        return self.document_ids, is_causal, SEED.to(is_causal.device), DROPOUT


def _fused(inputs: WholeInputs, variant: str) -> Tensor:
    tables = distance_tables(inputs.buckets, len(inputs.vectors), inputs.vectors.dtype, variant)
    return fused_attention(*inputs.tensors, tables, *inputs.rest, scale=0.07, num_heads=inputs.num_heads)


def _unfused(inputs: WholeInputs) -> Tensor:
    def attention(*arguments: Any) -> Tensor:
        heads, rest = arguments[:5], arguments[5:]
        return attention_context(*(tensor.contiguous() for tensor in heads), *rest, backend="torch")

    settings = {"scale": 0.07, "num_heads": inputs.num_heads, "attention": attention}
    return reference.fused_attention(*inputs.tensors, inputs.buckets, *inputs.rest, **settings)


VARIANTS = {"triton": "gather", "triton_load": "load"}
WHOLE_IMPLEMENTATIONS = {
    **{impl: functools.partial(_fused, variant=variant) for impl, variant in VARIANTS.items()},
    BASELINE: _unfused,
    COMPILED: _unfused,
}


@pytest.mark.parametrize("impl", WHOLE_IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", WHOLE, ids=str)
def test_whole_attention(measurement: Measurement, impl: str, shape: Whole) -> None:
    """From projections to the context, and back, in bf16."""
    shape = shape if measurement.enabled else TINY_WHOLE
    function = measurement.compiled(WHOLE_IMPLEMENTATIONS[impl])
    inputs = make_whole_inputs(shape)
    measurement.prove(whole_proof(impl, shape))
    measurement.time(lambda: whole_gradients(function, inputs), lambda: whole_gradients(_unfused, inputs))


def make_whole_inputs(shape: Whole) -> WholeInputs:
    """Two documents per row."""
    generator, width = machine.generator(shape.T), shape.H * shape.d
    sizes = ((shape.B, shape.T, 2 * width), (shape.B, shape.T, 2 * width), (shape.P, 2 * width))
    tensors = [torch.randn(size, generator=generator, device=generator.device).bfloat16() for size in sizes]
    distance = torch.arange(1 - shape.T, shape.T)
    most = shape.P // 2 - 1
    buckets = (distance.sign() * distance.abs().float().sqrt().mul(3).ceil().long()).clamp(-most, most) + most
    documents = (torch.arange(shape.T) > shape.T // 3).int().repeat(shape.B, 1)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    return WholeInputs(*leaves, buckets.to(machine.device()), documents.to(machine.device()), shape.H)


def whole_gradients(function: Callable[[WholeInputs], Tensor], inputs: WholeInputs) -> tuple[Tensor, ...]:
    """The context's sum, differentiated by the three inputs."""
    return torch.autograd.grad(function(inputs).sum(), inputs[:3])


def whole_proof(impl: str, shape: Whole) -> Iterator[Comparison]:
    """The operation's check at this shape; the other implementations are what it is compared with, or checked apart."""
    if impl in VARIANTS:
        yield from check.compare_fused(machine.device(), shape.H, shape.d, shape.T, shape.P, variant=VARIANTS[impl])
    else:
        yield from check.comparisons(torch.device("cpu"), "torch")
