"""All depth-weighted averages of a forward and its backward, as layer weighting takes them."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from benchmarks import machine, peers
from benchmarks.measurement import BASELINE, Measurement
from kernels.depth_mix import buffer, check, depth_mix, depth_mix_backward, reference
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


IMPLEMENTATIONS = {BASELINE: None, "torch": "torch", "cpp": "cpp"}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_depth_mix(measurement: Measurement, impl: str, shape: Shape) -> None:
    """Representations in fp32; the buffer of C++ kernels holds the older ones in bf16."""
    peers.skip_unless_possible(impl)
    inputs, backend = make_inputs(shape if measurement.enabled else TINY), IMPLEMENTATIONS[impl]
    measurement.prove(_proof(backend))
    if backend is None:
        measurement.time(lambda: _reference(*inputs), None)
    else:
        measurement.time(lambda: _ours(*inputs, backend), lambda: _reference(*inputs))


def _proof(backend: str | None) -> Iterator[Comparison]:
    """That of the check before a run; the reference is what it compares with."""
    yield from check.comparisons(torch.device("cpu"), backend or "torch")


def make_inputs(shape: Shape) -> Inputs:
    """Representations, and weights in a lower triangle."""
    generator = torch.Generator().manual_seed(shape.L)
    values = [torch.randn(shape.N, generator=generator).to(machine.device()) for _ in range(shape.L)]
    return values, torch.randn(shape.L, shape.L, generator=generator).tril().to(machine.device())
