"""Sums that stay on the device between log records, and the metrics computed from them."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gptbert.distributed.world import World
from gptbert.io.names import MEASURES
from gptbert.model.objective import Objective
from kernels import MaskedCrossEntropy
from kernels.backend import widest_float


class LossSums:
    """Per objective: summed loss, z-loss, correct predictions and labels, in one fp64 tensor on the device.

    On Apple's MPS it is fp32, in which sums of more than 2^24 labels are rounded.

    Attributes:
        sums: [objectives, 4] fp64; always the same tensor, and not read back before `means`.
        labels_before: [objectives] of all ranks, from before the checkpoint that the run goes on from.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(len(Objective), 4, dtype=widest_float(device), device=device)
        self.labels_before = [0.0] * len(Objective)

    def add(self, result: MaskedCrossEntropy) -> None:
        """Add the sums [objectives] of one forward pass."""
        sums = (result.loss, result.z_loss, result.correct, result.count)
        self.sums += torch.stack([each.to(self.sums.dtype) for each in sums], dim=1)

    def add_where(self, condition: Tensor, other: "LossSums") -> None:
        """Add the sums of `other` if the condition, a bool scalar on the device, holds."""
        self.sums += torch.where(condition, other.sums, 0.0)

    def reset(self) -> None:
        """Set all sums to zero."""
        self.sums.zero_()
        self.labels_before = [0.0] * len(Objective)

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's: {"sums": [objectives, 4] fp64 on the CPU}."""
        return {"sums": self.sums.cpu().double()}

    def load_rank_states(self, states: list[dict[str, Any]], world: World) -> None:
        """Take the sums of a checkpoint: this rank's, or all on the main rank if the number of ranks differs.

        Args:
            states: of each rank that saved, from `state_dict`.
            world: the run's processes.
        """
        of_all = torch.stack([state["sums"] for state in states]).sum(dim=0)
        if len(states) == world.world_size:
            self.sums.copy_(states[world.rank]["sums"])
        elif world.is_main:
            self.sums.copy_(of_all)
        self.labels_before = of_all[:, -1].tolist()

    def means(self, world: World) -> dict[Objective, dict[str, float]]:
        """Means over all ranks' labels, for each objective that has any; every rank must call it."""
        sums = world.all_reduce_sum(self.sums.clone()).tolist()
        return {
            objective: {
                "loss": loss / count,
                "perplexity": perplexity(loss / count),
                "accuracy": correct / count,
                "z_loss": z_loss / count,
                "count": count,
            }
            for objective, (loss, z_loss, correct, count) in zip(Objective, sums, strict=True)
            if count
        }

    def new_labels(self, means: dict[Objective, dict[str, float]]) -> dict[Objective, float]:
        """The labels in `means` that are not from before the checkpoint, for each objective that has any."""
        before = dict(zip(Objective, self.labels_before, strict=True))
        labels = {objective: values["count"] - before[objective] for objective, values in means.items()}
        return {objective: count for objective, count in labels.items() if count}


def training_losses(means: dict[Objective, dict[str, float]], weights: dict[Objective, float]) -> dict[str, float]:
    """The losses and accuracies of a training record; empty if all steps were skipped.

    Without those of both objectives together if all labels are of an objective that a resumed run trains no longer.

    Args:
        means: from `LossSums.means`.
        weights: the objectives' weights in the loss, up to a common factor.
    """
    record = {}
    if total := sum(weights.values()):
        for name in ("loss", "accuracy", "z_loss"):
            record[f"train/{name}"] = sum(weights[key] * values[name] for key, values in means.items()) / total
        record["train/perplexity"] = perplexity(record["train/loss"])
    for objective, values in means.items():
        for name in (*MEASURES, "z_loss"):
            record[f"train/{objective.value}/{name}"] = values[name]
    return record


class Throughput:
    """Training tokens per second, and the fraction of time spent waiting for rows.

    Attributes:
        tokens: tokens seen at the last call of `since_last`, or at the start.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self._since = time.perf_counter()
        self._waited = 0.0

    def since_last(self, tokens: int) -> tuple[float, float]:
        """Tokens per second, and the fraction of time spent in `waiting`, since the last call.

        Args:
            tokens: tokens seen so far.
        """
        now = time.perf_counter()
        seconds = now - self._since
        rate, share = (tokens - self.tokens) / seconds, self._waited / seconds
        self.tokens, self._since, self._waited = tokens, now, 0.0
        return rate, share

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Context manager: time in the block counts as waiting for rows."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context manager: time in the block does not count."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began


def perplexity(loss: float) -> float:
    """exp(loss), or infinity on overflow."""
    return math.inf if loss > 700 else math.exp(loss)
