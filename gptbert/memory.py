"""Memory of the process: how much it took at most, and that on CPUs a step takes again what the last one freed."""

import ctypes
import platform
import resource
import sys

import torch

# parameters of glibc's mallopt
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_LARGEST = 2**31 - 1
_PAD = 2**28  # bytes that the heap grows by at least


def keep_freed_memory() -> bool:
    """Have glibc keep what is freed instead of giving it back to the system, for this process and from now on.

    A step makes and frees gigabytes of tensors. Given back, their pages come anew, one fault and 4 KB of zeros at a
    time, which takes some 4 % of a step. All threads share one heap: those of their own that gloo's threads would get
    fray, by 2.3 MB in 1,000 steps among eight processes.

    Returns:
        Whether it could be had; elsewhere than on glibc nothing changes.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = {_ARENA_MAX: 1, _MMAP_MAX: 0, _TRIM_THRESHOLD: _LARGEST, _TOP_PAD: _PAD}
    return all(mallopt(name, value) == 1 for name, value in settings.items())


def peak_memory(device: torch.device) -> int:
    """Most bytes so far: that tensors took on the GPU, or that this process took of the host's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
