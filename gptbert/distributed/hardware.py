"""The device that a process computes on: its name, its cores, whether it has bf16, and the wait for it."""

import os
import platform
import re
from pathlib import Path

import torch


def hardware_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"Apple's MPS ({platform.machine()}, macOS {platform.mac_ver()[0]})"
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else []
    return models[0].strip() if models else platform.processor() or platform.machine()


def usable_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bf16 products; without them, products of fp32 are several times as fast.

    A CPU of which nothing is known (PyTorch before 2.12) counts as one that has them. Apple's MPS counts as one that
    has none: macOS 14 has bf16, not every chip does, and neither speed nor results have been looked at.
    """
    if device.type == "mps":
        return False
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    known: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return not known or any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "avx10_1", "bf16"))


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU has yet to do; a CPU has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
