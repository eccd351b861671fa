"""The machine: hardware, libraries, and rates of copies, matmuls and launches."""

import contextlib
import datetime as dt
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks import ROOT, machine
from benchmarks.gpu.settings import Settings
from gptbert.distributed.hardware import hardware_name, usable_cores
from gptbert.monitoring.flops import measure_matmul_flops

# dense bf16 FLOPs per second by NVIDIA's data sheets; the first whose name is in the GPU's
DATA_SHEET = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989.4e12, "H200": 989.4e12, "A100": 312e12, "B200": 2250e12,
}  # fmt: skip
SMI_FIELDS = {
    "driver": "driver_version", "SM clock MHz": "clocks.sm", "highest SM clock MHz": "clocks.max.sm",
    "memory clock MHz": "clocks.mem", "power limit W": "power.limit", "temperature °C": "temperature.gpu",
}  # fmt: skip
LAUNCHES = 500  # fewer than fit into a GPU's queue
RATES = 3


def data_sheet_flops(gpu: str) -> float | None:
    """FLOPs per second by the data sheet; None for machines that are not listed."""
    return next((flops for name, flops in DATA_SHEET.items() if name in gpu), None)


def labels(settings: Settings) -> dict[str, Any]:
    """Labels of the results: machine, versions, commit."""
    versions = machine.versions()
    return {
        "gpu": hardware_name(torch.device("cpu" if settings.rehearse else "cuda")),
        "rehearsal": settings.rehearse,
        "minutes": settings.minutes,
        "date": dt.datetime.now(tz=dt.UTC).isoformat(timespec="minutes"),
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version for name, version in versions.items() if name != "torch" and version},
    }


def commit() -> str:
    """The checkout's commit, and whether the files differ from it; "unknown" without git.

    GPTBERT_COMMIT in the environment provides it for a copy without .git.
    """
    if named := os.environ.get("GPTBERT_COMMIT"):
        return named
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()


def measure(settings: Settings) -> Iterator[dict[str, Any]]:
    """The machine's properties, then its rates."""
    here = machine.device()
    found: dict[str, Any] = {"cores": usable_cores(), "processor": hardware_name(torch.device("cpu"))}
    if here.type == "cuda":
        found |= gpu_properties()
    yield found
    found["launch_us"] = launch_microseconds()
    found["copy_tb_per_s"] = machine.copy_rate() / 1e12
    rates = [
        measure_matmul_flops(here, torch.bfloat16, quick=settings.rehearse) for _ in range(settings.times(RATES, 1))
    ]
    found["product_tflops"] = max(rates) / 1e12
    if here.type == "cuda":
        found["while warm"] = smi()
    found["summary"] = (
        f"copy {found['copy_tb_per_s']:.2f} TB/s, torch.mm {found['product_tflops']:.0f} TFLOPS, "
        f"{found['launch_us']:.1f} µs a launch"
    )
    yield found


def gpu_properties() -> dict[str, Any]:
    """Properties of the GPU, from PyTorch and nvidia-smi."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "memory_gb": properties.total_memory / 1e9,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda or torch.version.hip,
        "at rest": smi(),
    }


def smi() -> dict[str, str]:
    """Properties of the first GPU from nvidia-smi, such as clocks; empty without nvidia-smi."""
    query = f"--query-gpu={','.join(SMI_FIELDS.values())}"
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
        values = done.stdout.splitlines()[0].split(",")
        return dict(zip(SMI_FIELDS, (value.strip() for value in values), strict=False))
    return {}


def launch_microseconds() -> float:
    """Host microseconds per small operation; the median of five batches."""
    tensor = torch.zeros(16, device=machine.device())
    times = []
    for _ in range(5):
        machine.synchronize()
        start = time.perf_counter()
        for _ in range(LAUNCHES):
            tensor.add_(1)
        times.append(time.perf_counter() - start)
        machine.synchronize()
    return 1e6 * statistics.median(times) / LAUNCHES
