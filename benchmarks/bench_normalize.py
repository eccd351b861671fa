"""LayerNorm before a product under autocast, forward and backward; PyTorch's own keeps its fp32 input as well."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.measurement import BASELINE, COMPILED, Measurement
from kernels.normalize import embed, normalize, reference
from kernels.numerics import Comparison, compare_function

EPS = 1e-5
Normalize = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """N rows of D elements."""

    N: int
    D: int

    def __str__(self) -> str:
        return f"N={self.N} D={self.D}"


SHAPES = [Shape(2048, 384), Shape(2048, 768)]
TINY = Shape(5, 24)


def _reference(x: Tensor) -> Tensor:
    """To bf16, as autocast makes it before the product."""
    return reference.normalize(x, EPS).bfloat16()


def _ours(x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, torch.bfloat16):
        return normalize(x, EPS)


IMPLEMENTATIONS = {BASELINE: _reference, COMPILED: _reference, "torch": _ours, "torch_compiled": _ours}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_normalize(measurement: Measurement, impl: str, shape: Shape) -> None:
    """[N, D] in fp32 to bf16, and the gradient; proven with bf16 input, since the backward reads the bf16 result."""
    x, grad = make_inputs(shape if measurement.enabled else TINY)
    function = measurement.compiled(IMPLEMENTATIONS[impl])
    measurement.prove(compare_function("bf16", IMPLEMENTATIONS[impl], _exact, {"x": x.bfloat16()}))
    measurement.time(lambda: gradient(function, x, grad), lambda: gradient(_reference, x, grad))


def _exact(x: Tensor) -> Tensor:
    return reference.normalize(x, EPS)


@dataclass(frozen=True)
class Whole:
    """R tokens of a vocabulary of V, D elements each."""

    R: int
    D: int
    V: int

    def __str__(self) -> str:
        return f"R={self.R} D={self.D} V={self.V}"


WHOLE = [Whole(4096, 384, 8192)]
TINY_WHOLE = Whole(6, 24, 11)
Embed = Callable[[Tensor, Tensor, Tensor, float, float], Tensor]
WHOLE_IMPLEMENTATIONS: dict[str, Embed] = {
    "triton": embed,
    BASELINE: reference.embed,
    COMPILED: reference.embed,
}


@pytest.mark.parametrize("impl", WHOLE_IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", WHOLE, ids=str)
def test_embedding(measurement: Measurement, impl: str, shape: Whole) -> None:
    """Rows of the table, LayerNorm and dropout in fp32, and the table's gradient."""
    inputs = make_whole_inputs(shape if measurement.enabled else TINY_WHOLE)
    function = measurement.compiled(WHOLE_IMPLEMENTATIONS[impl])
    measurement.prove(whole_proof(WHOLE_IMPLEMENTATIONS[impl], TINY_WHOLE))
    measurement.time(lambda: whole_gradient(function, *inputs), lambda: whole_gradient(reference.embed, *inputs))


def make_whole_inputs(shape: Whole) -> tuple[Tensor, Tensor, Tensor]:
    """Ids [R], the table [V, D] in fp32, and dropout's seed."""
    generator = machine.generator(shape.D)
    ids = torch.randint(shape.V, (shape.R,), generator=generator, device=generator.device)
    table = torch.randn(shape.V, shape.D, generator=generator, device=generator.device).requires_grad_()
    return ids, table, torch.tensor([1, 2], dtype=torch.int32, device=generator.device)


def whole_gradient(function: Embed, ids: Tensor, table: Tensor, seed: Tensor) -> Tensor:
    """Of the table, for the sum of the result's squares."""
    return torch.autograd.grad(function(ids, table, seed, 0.1, EPS).square().sum(), table)[0]


def whole_proof(function: Embed, shape: Whole) -> Iterator[Comparison]:
    """By the tolerance rule."""
    ids, table, seed = make_whole_inputs(shape)
    yield from compare_function(
        str(shape),
        lambda table: function(ids, table, seed, 0.1, EPS),
        lambda table: reference.embed(ids, table, seed, 0.1, EPS),
        {"table": table},
    )


def make_inputs(shape: Shape) -> tuple[Tensor, Tensor]:
    """Hidden states in fp32, and a gradient in bf16."""
    generator = machine.generator(shape.D)
    x, grad = (torch.randn(shape.N, shape.D, generator=generator, device=generator.device) for _ in range(2))
    return x.requires_grad_(), grad.bfloat16()


def gradient(function: Normalize, x: Tensor, grad: Tensor) -> Tensor:
    """Of the input."""
    return torch.autograd.grad(function(x), x, grad)[0]
