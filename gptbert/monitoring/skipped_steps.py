"""Counts the steps that the optimizer skipped because gradients were not finite."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gptbert.errors import SharedError


class SkippedSteps:
    """Counters on the device; the same on every rank, since the gradient norm is.

    Attributes:
        counts: [3] int64, always the same tensor: skipped steps of the whole run, of the streak that ends with the
            newest step, and of the longest streak since `longest_row` was last called.
    """

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)

    def state_dict(self) -> dict[str, Any]:
        """{"skipped_steps": `counts`}."""
        return {"skipped_steps": self.counts}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take what `state_dict` returned."""
        self.counts.copy_(state["skipped_steps"])

    def add(self, gradient_norm: Tensor) -> Tensor:
        """Count a step, without a device sync.

        Returns:
            Whether the step was taken, a bool scalar on the device.
        """
        is_taken = gradient_norm.isfinite()
        total, row, longest = self.counts.unbind()
        row = torch.where(is_taken, 0, row + 1)
        self.counts.copy_(torch.stack([total + ~is_taken, row, torch.maximum(longest, row)]))
        return is_taken

    def total(self) -> int:
        """Skipped steps of the whole run."""
        return int(self.counts[0])

    def longest_row(self) -> int:
        """The longest streak of skipped steps since the last call."""
        _, row, longest = self.counts.tolist()
        self.counts[2] = row
        return longest

    def raise_if_too_many(self, most: int, step: int) -> None:
        """End the run if it skips too many steps in a row.

        Args:
            most: the streak of skipped steps, since `longest_row` was last called, that ends the run.
            step: steps completed.

        Raises:
            SharedError: on every rank.
        """
        longest = self.longest_row()
        if longest >= most:
            raise SharedError(
                f"training diverged: by step {step}, the gradients of {longest} steps one after another were not "
                f"finite (--max_skipped_steps {most}); go on from a checkpoint before (--resume PATH, another --name), "
                "with a lower --learning_rate, say"
            )
