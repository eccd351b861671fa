"""The check of Triton's kernels before a run: in a process of its own, while this one reads its inputs.

A kernel that faults takes the GPU's context of its process with it, and perhaps the process: then that one ends, and
this one says what happened.
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

SECONDS = 300  # that it may take; some five where nothing was compiled before


def run_of(config: TrainConfig, model_config: ModelConfig, plan: HybridPlan, world: World) -> Run:
    """What the kernels of a run must do."""
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
    """A block beside which the check goes on; at its end the process is gone.

    Every rank checks its own GPU: one of several may be at fault.

    Args:
        run: what is checked; None for a run that starts no kernel of Triton's.
        device: of this process.

    Yields:
        A function that waits for the result, and raises InputError where a kernel differs from its reference, or the
        check came to no end.
    """
    if run is None:
        yield lambda: None
        return
    paths = [str(Path(kernels.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    with tempfile.TemporaryFile("w+") as errors:  # no pipe, which somebody would have to empty
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
        last = lines[-1].removeprefix("kernels.check: ")  # its own words, or what Python says of an exception
        raise InputError(last if last.startswith("kernel check failed") else f"kernel check failed: {last}; {WAY_ON}")
