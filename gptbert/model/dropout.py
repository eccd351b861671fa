"""Dropout as a module, and the seeds of its masks; `kernels.dropout` draws them."""

import torch
from torch import Tensor, nn

from kernels.dropout import dropout

SEED_WORDS = 2  # of 32 bits, per mask


class Dropout(nn.Module):
    """Zero elements with a probability, and scale the others to preserve the mean.

    Args:
        probability: of zeroing, in [0, 1).
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor, seed: Tensor | None) -> Tensor:
        """Drop elements of `x` in training mode.

        Args:
            x: of any shape, fewer than 2³¹ elements.
            seed: [2] int32 from `random_seeds`; None disables dropout, as does eval mode.
        """
        return dropout(x, seed if self.training else None, self.probability)

    def extra_repr(self) -> str:
        """For print(model)."""
        return f"probability={self.probability}"


def random_seeds(count: int, device: torch.device) -> Tensor:
    """[count, 2] int32: seeds of `count` masks, from the device's default generator; for Apple's MPS, the CPU's."""
    drawn_on = torch.device("cpu") if device.type == "mps" else device  # checkpoints save the CPU's state anyway
    seeds = torch.randint(-(2**31), 2**31, (count, SEED_WORDS), dtype=torch.int32, device=drawn_on)
    return seeds.to(device)
