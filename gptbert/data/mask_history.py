"""Counts how often each training token was masked, so that every token gets its turn (`--mask_history`)."""

import torch
import torch.distributed as dist
from torch import Tensor

from gptbert.distributed.world import World
from gptbert.errors import InputError
from kernels import IGNORE_INDEX

_MOST = torch.iinfo(torch.uint8).max


class MaskHistory:
    """One counter per training token, the same on every rank after every step.

    A token occurs once per epoch, on any rank, so each rank needs the masks of all: one small all-gather per step.

    Attributes:
        counts: [num_tokens + 1] uint8, saturating; the last entry absorbs positions that are not tokens.
    """

    def __init__(self, num_tokens: int, world: World) -> None:
        self._world = world
        self.counts = torch.zeros(num_tokens + 1, dtype=torch.uint8, device=world.device)

    def lookup(self, positions: Tensor) -> Tensor:
        """Counts of the tokens at `positions` in the concatenated token stores (−1: no token), of the same shape."""
        return self.counts[positions]

    def update(self, positions: Tensor, labels: Tensor, capacity: int) -> None:
        """Count all ranks' labels of this step; every rank must call it.

        Args:
            positions: [B, T], position of each label in the token stores.
            labels: [B, T]; B may be 0.
            capacity: maximum of B over the ranks.
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
        self.counts[masked] = counts + (counts < _MOST)  # duplicates are harmless: they write the same value


def check_counts(counts: Tensor | None, num_tokens: int) -> None:
    """Refuse to resume from a checkpoint's counts if they belong to different token files.

    Args:
        counts: `MaskHistory.counts`, or None if none are loaded.
        num_tokens: this run's.

    Raises:
        InputError: the counts are for a different number of tokens.
    """
    if counts is not None and len(counts) != num_tokens + 1:
        raise InputError(
            f"--mask_history: the checkpoint counts masks of {len(counts) - 1:,} tokens, but --train_path holds "
            f"{num_tokens:,}; name the token files that it was trained on, or leave --mask_history out"
        )
