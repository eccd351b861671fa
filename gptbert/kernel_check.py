"""Checks the Triton kernels before a run, in a subprocess, while this process reads its inputs.

A kernel fault corrupts the CUDA context and may kill the process: in a subprocess, this process survives and reports
the error.
"""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TextIO

import torch

import kernels
from gptbert.config import ModelConfig, TrainConfig
from gptbert.data.hybrid_plan import HybridPlan
from gptbert.distributed.world import World
from gptbert.errors import InputError
from kernels.check import WAY_ON
from kernels.run import Run

SECONDS = 300  # timeout; it takes some five without a compile cache


def run_of(config: TrainConfig, model_config: ModelConfig, plan: HybridPlan, world: World) -> Run:
    """The settings that the kernels of a run must work with."""
    return Run(
        dtype="bfloat16" if config.mixed_precision else "float32",
        vocab_size=model_config.vocab_size,
        row_lengths=tuple(sorted({factor * config.seq_length + 1 for factor in plan.length_factors})),
        validation_length=config.seq_length + 1,
        mask_history=config.mask_history,
        lamb=config.optimizer == "lamb",
        buckets=world.world_size > 1,
    )


@contextmanager
def kernel_check(run: Run | None, device: torch.device) -> Iterator[Callable[[], None]]:
    """Context manager: the check runs in parallel to the block; its process is killed at the end.

    Every rank checks its own GPU: any of them may be faulty.

    Args:
        run: the settings to check; None for a run without Triton kernels.
        device: this process's device.

    Yields:
        A function that waits for the result, and raises InputError if a kernel differs from its reference or the check
        does not finish.
    """
    if run is None:
        yield lambda: None
        return
    paths = [str(Path(kernels.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryFile("w+") as errors:  # not a pipe, which would have to be drained
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "kernels.check", "--device", str(device), "--run", run.to_json()],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
        try:
            yield partial(_finish, process, errors)
        finally:
            process.kill()
            process.wait()


def _finish(process: subprocess.Popen, errors: TextIO) -> None:
    try:
        status = process.wait(SECONDS)
    except subprocess.TimeoutExpired:
        raise InputError(f"kernel check failed: it had no result after {SECONDS} seconds; {WAY_ON}") from None
    if status < 0:
        name = signal.Signals(-status).name
        raise InputError(f"kernel check failed: a kernel ended the process of the check ({name}); {WAY_ON}")
    if status:
        errors.seek(0)
        lines = [line.strip() for line in errors if line.strip()] or [f"exit status {status}"]
        last = lines[-1].removeprefix("kernels.check: ")  # its own message, or the last line of a traceback
        raise InputError(last if last.startswith("kernel check failed") else f"kernel check failed: {last}; {WAY_ON}")
