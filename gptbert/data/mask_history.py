"""How often each training token was masked before, so that every token gets its turn (`--mask_history`)."""

import torch
import torch.distributed as dist
from torch import Tensor

from gptbert.distributed.world import World
from gptbert.errors import InputError
from kernels import IGNORE_INDEX

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
        """Counts of the tokens at `positions` (in the token stores, end to end; −1 for no token), of the same shape."""
        return self.counts[positions]

    def update(self, positions: Tensor, labels: Tensor, capacity: int) -> None:
        """Count this step's labels of all ranks; every rank must call it.

        Args:
            positions: [B, T], where each label stands in the token stores.
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


def check_counts(counts: Tensor | None, num_tokens: int) -> None:
    """Refuse to go on from the counts of a checkpoint where they are of other token files.

    Args:
        counts: `MaskHistory.counts`, or None where none are taken up.
        num_tokens: of this run.

    Raises:
        InputError: there are as many counts as for another number of tokens.
    """
    if counts is not None and len(counts) != num_tokens + 1:
        raise InputError(
            f"--mask_history: the checkpoint counts masks of {len(counts) - 1:,} tokens, but --train_path holds "
            f"{num_tokens:,}; name the token files that it was trained on, or leave --mask_history out"
        )
