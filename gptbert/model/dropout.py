"""Dropout as a module, and the seeds of its masks; `kernels.dropout` draws them."""

import torch
from torch import Tensor, nn

from kernels.dropout import dropout

SEED_WORDS = 2  # of 32 bits, for each mask


class Dropout(nn.Module):
    """Zero entries with a probability, and scale the others so that the mean stays.

    Args:
        probability: of zero, in [0, 1).
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor, seed: Tensor | None) -> Tensor:
        """Drop entries of `x` where the module trains.

        Args:
            x: of any shape, below 2³¹ entries.
            seed: [2] int32 from `random_seeds`; None switches dropout off, as eval mode does.
        """
        return dropout(x, seed if self.training else None, self.probability)

    def extra_repr(self) -> str:
        """For print(model)."""
        return f"probability={self.probability}"


def random_seeds(count: int, device: torch.device) -> Tensor:
    """[count, 2] int32: seeds of `count` masks, from PyTorch's generator of the device."""
    return torch.randint(-(2**31), 2**31, (count, SEED_WORDS), dtype=torch.int32, device=device)
