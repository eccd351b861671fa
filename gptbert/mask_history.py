"""How often each training token was masked before, so that every token gets its turn (`--mask_history`)."""

import torch
import torch.distributed as dist
from torch import Tensor

from gptbert.distributed import World
from gptbert.model import IGNORE_INDEX

_MOST = torch.iinfo(torch.uint8).max


class MaskHistory:
    """A counter per training token, the same on every rank after every step.

    A token comes up once an epoch, on any rank, so each rank needs what all ranks masked: one small all-gather a step.

    Attributes:
        counts: [num_tokens + 1] uint8, saturating; the last entry takes what is no token.
    """

    def __init__(self, num_tokens: int, world: World) -> None:
        self._world = world
        self.counts = torch.zeros(num_tokens + 1, dtype=torch.uint8, device=world.device)

    def lookup(self, positions: Tensor) -> Tensor:
        """Counts of the tokens at `positions` (in the token store; −1 for no token), of the same shape."""
        return self.counts[positions]

    def update(self, positions: Tensor, labels: Tensor, capacity: int) -> None:
        """Count this step's labels of all ranks; every rank must call it.

        Args:
            positions: [B, T], where each label stands in the token store.
            labels: [B, T]; B may be 0.
            capacity: B of the rank that has most rows.
        """
        masked = torch.where(labels == IGNORE_INDEX, -1, positions)
        padded = torch.full((capacity, labels.shape[1]), -1, device=labels.device)
        padded[: len(masked)] = masked
        gathered = [padded]
        if self._world.world_size > 1:
            gathered = [torch.empty_like(padded) for _ in range(self._world.world_size)]
            dist.all_gather(gathered, padded)
        masked = torch.stack(gathered)
        counts = self.counts[masked]
        self.counts[masked] = counts + (counts < _MOST)  # a token named twice is written the same value twice
