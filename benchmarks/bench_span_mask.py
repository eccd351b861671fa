"""Span masking of a step's rows: 4,096 tokens, as in the trainer on one GPU, and a batch four times as large."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.measurement import BASELINE, COMPILED, Measurement
from kernels import span_mask
from kernels.numerics import Comparison, compare_exactly
from kernels.span_mask import reference

SETTINGS = {
    "mask_p": 0.3,
    "random_p": 0.1,
    "keep_p": 0.1,
    "mask_token_id": 4,
    "vocab_size": 16384,
    "num_special_tokens": 16,
    "max_span_length": 3,
    "seed": 2**40 + 1,
}

Mask = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Shape:
    """B rows of T tokens."""

    B: int
    T: int

    def __str__(self) -> str:
        return f"B={self.B} T={self.T}"


SHAPES = [Shape(32, 128), Shape(8, 512), Shape(128, 128)]
TINY = Shape(3, 32)


def _reference(tokens: Tensor, row_ids: Tensor) -> tuple[Tensor, Tensor]:
    return reference.span_mask(tokens, row_ids=row_ids, mask_counts=None, **SETTINGS)


def _ours(tokens: Tensor, row_ids: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return span_mask(tokens, row_ids=row_ids, backend=backend, **SETTINGS)


IMPLEMENTATIONS = {
    BASELINE: _reference,
    COMPILED: _reference,
    "torch": functools.partial(_ours, backend="torch"),
    "triton": functools.partial(_ours, backend="triton"),
}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_span_mask(measurement: Measurement, impl: str, shape: Shape) -> None:
    """Tokens in int64 to inputs and labels; bytes by the formula of `benchmarks.traffic`, row ids included."""
    shape = shape if measurement.enabled else TINY
    mask = measurement.compiled(IMPLEMENTATIONS[impl])
    tokens, row_ids = make_rows(shape)
    measurement.prove(proof(mask, tokens, row_ids))
    on_gpu = machine.device().type == "cuda"  # where memory is the limit
    fewest_bytes = 3 * tokens.nbytes + row_ids.nbytes if on_gpu else None
    measurement.time(lambda: mask(tokens, row_ids), lambda: _reference(tokens, row_ids), fewest_bytes)


def make_rows(shape: Shape) -> tuple[Tensor, Tensor]:
    """Tokens [B, T], some of them special, and row ids [B], on the device."""
    generator = torch.Generator().manual_seed(shape.T)
    tokens = torch.randint(
        SETTINGS["num_special_tokens"], SETTINGS["vocab_size"], (shape.B, shape.T), generator=generator
    )
    tokens[torch.rand(tokens.shape, generator=generator) < 0.02] = 1
    row_ids = torch.arange(shape.B) + 2**33
    return tokens.to(machine.device()), row_ids.to(machine.device())


def proof(mask: Mask, tokens: Tensor, row_ids: Tensor) -> Iterator[Comparison]:
    """Bit-identical to the reference, which runs on the CPU."""
    expected = _reference(tokens.cpu(), row_ids.cpu())
    for name, actual, right in zip(("inputs", "labels"), mask(tokens, row_ids), expected, strict=True):
        yield compare_exactly(name, actual.cpu(), right)
