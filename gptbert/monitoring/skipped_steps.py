"""Counts the steps that the optimizer skipped because gradients were not finite."""

import torch
from torch import Tensor

from gptbert.errors import SharedError


class SkippedSteps:
    """Counters on the device; the same on every rank, since the gradient norm is.

    Attributes:
        counts: [3] int64, always the same tensor: skipped steps of the whole run, of the streak that ends with the
            newest step, and of the longest streak since `take_longest_streak` was last called.
    """

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)

    def add(self, gradient_norm: Tensor) -> Tensor:
        """Count a step, without a device sync.

        Returns:
            Whether the step was taken, a bool scalar on the device.
        """
        is_taken = gradient_norm.isfinite()
        total, streak, longest = self.counts.unbind()
        streak = torch.where(is_taken, 0, streak + 1)
        self.counts.copy_(torch.stack([total + ~is_taken, streak, torch.maximum(longest, streak)]))
        return is_taken

    def total(self) -> int:
        """Skipped steps of the whole run."""
        return int(self.counts[0])

    def take_longest_streak(self) -> int:
        """The longest streak of skipped steps since the last call, which begins the next one."""
        _, streak, longest = self.counts.tolist()
        self.counts[2] = streak
        return longest

    def raise_if_too_many(self, most: int, step: int) -> None:
        """End the run if it skips too many steps in a row.

        Args:
            most: the streak of skipped steps, since `take_longest_streak` was last called, that ends the run.
            step: steps completed.

        Raises:
            SharedError: on every rank.
        """
        longest = self.take_longest_streak()
        if longest >= most:
            raise SharedError(
                f"training diverged: by step {step}, the gradients of {longest} steps one after another were not "
                f"finite (--max_skipped_steps {most}); go on from a checkpoint before (--resume PATH, another --name), "
                "with a lower --learning_rate, say"
            )
