"""Dropout by counting, forward and backward, beside PyTorch's own, which draws serially on a CPU."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import machine
from benchmarks.measurement import BASELINE, Measurement
from kernels.dropout import dropout, reference
from kernels.numerics import Comparison, compare_exactly

SEED, PROBABILITY = (77, -5), 0.1
Dropout = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """N elements."""

    N: int

    def __str__(self) -> str:
        return f"N={self.N}"


SHAPES = [Shape(2**20), Shape(2**23)]
TINY = Shape(100)


def _pytorch(x: Tensor, seed: Tensor) -> Tensor:
    del seed
    return F.dropout(x, PROBABILITY)


def _ours(x: Tensor, seed: Tensor) -> Tensor:
    return dropout(x, seed, PROBABILITY)


IMPLEMENTATIONS = {BASELINE: _pytorch, "torch": _ours, "torch_compiled": _ours}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dropout(measurement: Measurement, impl: str, shape: Shape) -> None:
    """In fp32. The baseline is exempt from the proof: its masks are of another generator."""
    shape = shape if measurement.enabled else TINY
    x, seed = torch.ones(shape.N, device=machine.device(), requires_grad=True), _seed()
    function = measurement.compiled(IMPLEMENTATIONS[impl])
    if impl == BASELINE:
        measurement.exempt()
    else:
        measurement.prove(_proof(function))
    measurement.time(lambda: gradient(function, x, seed), lambda: gradient(_pytorch, x, seed))


def _seed() -> Tensor:
    return torch.tensor(SEED, dtype=torch.int32, device=machine.device())


def _proof(function: Dropout) -> Iterator[Comparison]:
    x = torch.ones(TINY.N)
    kept = function(x.to(machine.device()), _seed()).cpu() != 0
    yield compare_exactly("kept", kept, reference.dropout(x, SEED, PROBABILITY) != 0)


def gradient(function: Dropout, x: Tensor, seed: Tensor) -> Tensor:
    """Of the input, for a gradient of ones."""
    return torch.autograd.grad(function(x, seed).sum(), x)[0]
