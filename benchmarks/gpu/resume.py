"""A killed and resumed run against an uninterrupted one: bit-identical?"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file

from benchmarks import ROOT
from benchmarks.gpu.settings import Settings
from benchmarks.gpu.steps import without_code
from gptbert.checkpoint.folder import list_checkpoints
from gptbert.command_line import run_command
from gptbert.config import TrainConfig
from gptbert.train import fit
from gptbert.training import compile_choice
from tests.runs import flags, write_inputs

STEPS = 20
POLL_SECONDS = 0.02
SETTINGS = {
    "max_steps": STEPS, "save_every": STEPS // 4, "keep_checkpoints": 4, "validate_every": STEPS // 2,
    "mixed_precision": True, "mask_history": True, "trackers": [], "kernel_check": "off", "wandb_mode": False,
    "device": "auto", "cpu_threads": 1,
}  # fmt: skip


def measure(settings: Settings, *, is_compiled: bool) -> Iterator[dict[str, Any]]:
    """`differing`: number of tensors of the last checkpoints that differ, of `tensors`.

    One run is uninterrupted; a second is killed by SIGKILL midway and resumes from its last checkpoint. All share the
    compiled code on disk, as a user's runs do.
    """
    folder = settings.work / "resume" / ("compiled" if is_compiled else "plain")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    inputs = write_inputs(folder)
    way = "plain" if not is_compiled else "traced" if settings.rehearse else "compiled"
    _wait(_start(inputs, "whole", way))
    yield {"summary": "one run has ended"}
    killed_at = _kill_after(_start(inputs, "killed", way), folder / "runs" / "killed", STEPS // 2)
    _wait(_start(inputs, "killed", way, resume="auto"))
    tensors, differing = compare(*(list_checkpoints(folder / "runs" / name)[-1] for name in ("whole", "killed")))
    yield {
        "steps": STEPS, "killed_at_step": killed_at, "tensors": tensors, "differing": len(differing),
        "names": differing[:20],
        "summary": f"killed at step {killed_at} of {STEPS}, {len(differing)} of {tensors} tensors differ",
    }  # fmt: skip


def _start(inputs: Path, name: str, way: str, **changes: object) -> subprocess.Popen:
    """A run; its way is "plain", "compiled", or "traced": compiled without code generation."""
    arguments = flags(inputs, name=name, **SETTINGS, no_compile=way == "plain", **changes)
    return subprocess.Popen([sys.executable, "-m", "benchmarks.gpu.resume", way, *arguments], cwd=ROOT)


def _wait(process: subprocess.Popen) -> None:
    if process.wait():
        raise subprocess.CalledProcessError(process.returncode, process.args)


def _kill_after(process: subprocess.Popen, run: Path, step: int) -> int:
    """Kill a run once it has a checkpoint of this step or a later one; the newest checkpoint's step.

    Raises:
        RuntimeError: the run ended before.
    """
    while process.poll() is None:
        if (found := list_checkpoints(run)) and (reached := int(found[-1].name.rpartition("_")[2])) >= step:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            if reached == STEPS:
                break
            return reached
        time.sleep(POLL_SECONDS)
    raise RuntimeError(f"the run that was to be killed has ended, with status {process.returncode}")


def compare(one: Path, other: Path) -> tuple[int, list[str]]:
    """The number of tensors in two checkpoints, and those that differ in a bit or exist in only one."""
    tensors = [
        {
            f"{file.relative_to(path)}/{name}": tensor
            for file in sorted(path.rglob("*.safetensors"))
            for name, tensor in load_file(file).items()
        }
        for path in (one, other)
    ]
    names = sorted(tensors[0].keys() | tensors[1].keys())
    differing = [name for name in names if not _equal(tensors[0].get(name), tensors[1].get(name))]
    return len(names), differing


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None or one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


if __name__ == "__main__":
    always_compiled = patch.dict(compile_choice.COMPILE_SECONDS, cpu=0, cuda=0)  # however short the run
    with always_compiled, without_code() if sys.argv[1] == "traced" else nullcontext():
        run_command(TrainConfig, fit, sys.argv[2:], under_torchrun=True)
