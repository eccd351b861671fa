"""How much arithmetic a training step needs, and how much a device can do: model FLOP utilization."""

import time

import torch

from gptbert.config import ModelConfig
from gptbert.distributed.hardware import synchronize

_SIZES = {"cpu": (1024, 2048, 4096), "cuda": (4096, 8192)}  # of square matrices
_QUICK_SIZES = {"cpu": (1024,), "cuda": (8192,)}  # milliseconds; on a GPU, launching smaller products takes longer
_REPEATS = 4


def forward_flops(config: ModelConfig, length: int, labeled_fraction: float) -> float:
    """FLOPs of the matrix products that one token needs, forward; a backward needs twice as many.

    Per layer 2·(5D² + 3DI) of projections, 4TD of attention over all T keys, 4(2S−1)D of position scores; and for a
    token with a label 2D² + 2DV of the head. What an implementation computes beyond that does not count.

    Args:
        config: the model's shape.
        length: T.
        labeled_fraction: share of the tokens that carry a label.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    positions = 2 * config.position_bucket_size - 1
    layer = 2 * (5 * hidden**2 + 3 * hidden * inner) + 4 * length * hidden + 4 * positions * hidden
    head = 2 * hidden**2 + 2 * hidden * config.vocab_size
    return config.num_hidden_layers * layer + labeled_fraction * head


def training_flops(config: ModelConfig, length: int, labeled_fraction: float) -> float:
    """FLOPs that one token needs, forward and backward."""
    return 3 * forward_flops(config, length, labeled_fraction)


def measure_matmul_flops(device: torch.device, dtype: torch.dtype, *, quick: bool = False) -> float:
    """The best rate of torch.mm that the device shows, in FLOPs a second.

    Args:
        device: where.
        dtype: of the matrices.
        quick: in some milliseconds, from one size of square matrices; else a second or two, from all that may be best.
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
