"""A bias and its gradient against plain PyTorch."""

from collections.abc import Iterator

import torch

from kernels.add_bias import add_bias, reference
from kernels.add_bias.cpp import column_sums
from kernels.numerics import Comparison, compare, compare_function, random_bf16
from kernels.run import Run


def comparisons(device: torch.device, backend: str, run: Run | None = None) -> Iterator[Comparison]:
    """Forward and backward in bf16, at sizes that are not multiples of a SIMD vector; always on the CPU."""
    del device, run
    x = random_bf16(45, 300)
    if backend == "cpp":
        yield from compare("column_sums", column_sums(x), x.double().sum(0), x.sum(0, dtype=torch.float32))
    inputs = {"product": random_bf16(3, 15, 37), "bias": random_bf16(37).float()}
    yield from compare_function("bf16", lambda **each: add_bias(**each, backend=backend), reference.add_bias, inputs)
