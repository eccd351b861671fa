"""The device that a process computes on: its name, its cores, and the wait for it."""

import os
import platform
import re
from pathlib import Path

import torch


def hardware_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else []
    return models[0].strip() if models else platform.processor() or platform.machine()


def usable_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU has yet to do; a CPU has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
