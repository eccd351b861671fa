"""Memory growth over some hundreds of steps, with a run's records."""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import machine
from benchmarks.gpu.cases import StepCase
from benchmarks.gpu.settings import Settings
from benchmarks.gpu.steps import TrainingSteps
from gptbert.monitoring.metrics import Throughput

CASE = StepCase("small", "hybrid", 32, 128)
STEPS, RECORD_EVERY = 300, 10
WARM_UP = 1 / 6  # fraction of samples to ignore


def measure(settings: Settings) -> Iterator[dict[str, Any]]:
    """`slope_mb`: memory growth in 10⁶ bytes per thousand steps, by kind; and the first and last loss."""
    count = settings.times(STEPS, 3 * RECORD_EVERY)
    samples: list[dict[str, float]] = []
    losses = []
    way = "plain" if settings.rehearse else "ours"  # the parts of `steps` rehearse compilation
    with TrainingSteps(CASE, settings, way, count) as steps:
        throughput = Throughput(0)
        for _ in range(count // RECORD_EVERY):
            norm = steps.take(RECORD_EVERY)
            losses.append(steps.trainer.training_record(norm, throughput)["train/loss"])
            samples.append({"step": steps.trainer.step, **memory()})
            yield _found(samples, losses)


def memory() -> dict[str, float]:
    """Bytes of memory, by kind."""
    machine.synchronize()
    found = {}
    if (statm := Path("/proc/self/statm")).exists():
        found["host"] = int(statm.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if machine.device().type == "cuda":
        found["allocated"] = torch.cuda.memory_allocated()
        found["highest"] = torch.cuda.max_memory_allocated()
        found["reserved"] = torch.cuda.memory_reserved()
    return found


def _found(samples: list[dict[str, float]], losses: list[float]) -> dict[str, Any]:
    kept = samples[math.ceil(WARM_UP * len(samples)) :]
    found: dict[str, Any] = {"steps": samples[-1]["step"], "first_loss": losses[0], "last_loss": losses[-1]}
    if len(kept) < 2:
        return found
    numbers = [sample["step"] for sample in kept]
    kinds = [kind for kind in kept[0] if kind != "step"]
    found["slope_mb"] = {
        kind: float(np.polyfit(numbers, [sample[kind] for sample in kept], 1)[0]) * 1000 / 1e6 for kind in kinds
    }
    found["last_gb"] = {kind: kept[-1][kind] / 1e9 for kind in kinds}
    slopes = ", ".join(f"{kind} {slope:+.2f}" for kind, slope in found["slope_mb"].items())
    found["summary"] = f"{found['steps']} steps; MB in 1,000 steps: {slopes}"
    return found
