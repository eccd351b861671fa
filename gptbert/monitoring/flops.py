"""FLOPs of a training step and a device's FLOP rate, for model FLOP utilization."""

import time

import torch

from gptbert.config import ModelConfig
from gptbert.distributed.hardware import synchronize

_SIZES = {"cpu": (1024, 2048, 4096), "cuda": (4096, 8192), "mps": (2048, 4096)}  # of square matrices
_QUICK_SIZES = {"cpu": (1024,), "cuda": (8192,), "mps": (4096,)}  # milliseconds; smaller GPU products are launch-bound
_REPEATS = 4


def forward_flops(config: ModelConfig, length: int, labeled_fraction: float) -> float:
    """FLOPs of one token's matrix products in the forward; the backward has twice as many.

    Per layer: projections 2·(5D² + 3DI), attention over all T keys 4TD, position scores 4(2S−1)D; and for a labeled
    token, the head 2D² + 2DV. Anything an implementation computes beyond that does not count.

    Args:
        config: the model's shape.
        length: T.
        labeled_fraction: fraction of tokens with a label.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    positions = 2 * config.position_bucket_size - 1
    layer = 2 * (5 * hidden**2 + 3 * hidden * inner) + 4 * length * hidden + 4 * positions * hidden
    head = 2 * hidden**2 + 2 * hidden * config.vocab_size
    return config.num_hidden_layers * layer + labeled_fraction * head


def training_flops(config: ModelConfig, length: int, labeled_fraction: float) -> float:
    """FLOPs per token, forward and backward."""
    return 3 * forward_flops(config, length, labeled_fraction)


def measure_matmul_flops(device: torch.device, dtype: torch.dtype, *, quick: bool = False) -> float:
    """The best measured rate of torch.mm on the device, in FLOP/s.

    Args:
        device: the device.
        dtype: of the matrices.
        quick: take milliseconds, for one size of square matrices; otherwise a second or two, for all candidate sizes.
    """
    best = 0.0
    for size in (_QUICK_SIZES if quick else _SIZES)[device.type]:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        for _ in range(_REPEATS):
            synchronize(device)
            start = time.perf_counter()
            torch.mm(left, right)
            synchronize(device)
            best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best
