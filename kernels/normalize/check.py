"""LayerNorm before a product against PyTorch's LayerNorm."""

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.normalize import normalize, reference
from kernels.numerics import Comparison, compare_function
from kernels.run import Run

_EPS = 1e-5


def comparisons(device: torch.device, backend: str, run: Run | None = None) -> Iterator[Comparison]:
    """Under autocast to bf16 and without, forward and backward; the mean is large, where E[x²] − E[x]² fails."""
    del backend, run
    x = 3 * torch.randn(7, 100, generator=torch.Generator().manual_seed(1)) + 100

    def under_autocast(x: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return normalize(x, _EPS)

    def exact(x: Tensor) -> Tensor:
        return reference.normalize(x, _EPS)

    yield from compare_function("fp32", lambda x: normalize(x, _EPS), exact, {"x": x.to(device)})
    # bf16, because the backward reads the rounded result
    yield from compare_function("autocast", under_autocast, exact, {"x": x.to(device, torch.bfloat16)})
