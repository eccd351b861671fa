"""The benchmark machine: its name, library versions, memory bandwidth."""

import functools
import importlib.metadata
import os
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from gptbert.distributed.hardware import hardware_name, usable_cores
from gptbert.distributed.hardware import synchronize as synchronize_device

RESULTS = Path(__file__).parent / "results"
OPERATIONS, STEPS = ".csv", "-train-step.json"  # suffixes of files there: of `pytest benchmarks`, and of training steps
LIBRARIES = ("torch", "triton", "liger-kernel", "cut-cross-entropy", "pytorch-optimizer")
COPIES = 7
COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}  # far beyond any cache


@functools.cache  # called in timed code
def device() -> torch.device:
    """The device of benchmarks: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def generator(seed: int) -> torch.Generator:
    """Random numbers on the device of benchmarks: a CPU takes seconds for a GPU's sizes."""
    return torch.Generator(device()).manual_seed(seed)


def hardware() -> str:
    """The GPU's name, or the processor's without a GPU."""
    return hardware_name(device())


def file_name() -> str:
    """A name for this machine's files: lower case, digits and hyphens."""
    name = hardware() if device().type == "cuda" else f"{hardware()} {usable_cores()} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def results_file(suffix: str) -> Path:
    """This machine's file in benchmarks/results/ with a suffix."""
    return RESULTS / f"{file_name()}{suffix}"


def processes() -> int:
    """Number of processes that can train here without sharing a GPU, or a core without GPUs."""
    return torch.cuda.device_count() if device().type == "cuda" else usable_cores()


def load() -> float:
    """The one-minute load average; NaN if the system does not report it."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")


@functools.cache
def versions() -> dict[str, str]:
    """Version of each of `LIBRARIES`, empty if not installed."""
    found = {}
    for library in LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            found[library] = ""
    return found


def seconds(action: Callable[[], object]) -> float:
    """Seconds that `action` takes, including a device sync."""
    synchronize()
    start = time.perf_counter()
    action()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    synchronize_device(device())


def copy_rate() -> float:
    """Bytes per second, read plus written, of a large copy in device memory; the median of several."""
    here = device()
    source = torch.ones(COPY_BYTES[here.type] // 4, device=here)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / statistics.median(seconds(lambda: target.copy_(source)) for _ in range(COPIES))
