"""Memory of the process: how much it took at most, and that on CPUs a step takes again what the last one freed."""

import ctypes
import mmap
import os
import platform
import resource
import sys
from pathlib import Path

import torch

# parameters of glibc's mallopt
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_NEVER = -1
_PAD = 2**28  # bytes that the heap grows by at least
_HUGE_PAGE = 2**21
_OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")  # 2: a machine promises no more memory than it has


def keep_freed_memory() -> bool:
    """Have glibc keep what is freed instead of giving it back to the system, for this process and from now on.

    A step makes and frees gigabytes of tensors. Given back, their pages come anew, one fault and 4 KB of zeros at a
    time, which takes some 4 % of a step. All threads share one heap: those of their own that gloo's threads would get
    fray, by 2.3 MB in 1,000 steps among eight processes. Where Linux has pages of 2 MB for who asks, the heap gets
    them: a core finds its way to fewer pages faster, by 1 % of a step at T = 128 and 3 % at T = 512.

    With `--no_huge_pages` a run does without.

    Returns:
        Whether it could be had; elsewhere than on glibc nothing changes.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    settings = {_ARENA_MAX: 1, _MMAP_MAX: 0, _TRIM_THRESHOLD: _NEVER, _TOP_PAD: _PAD}
    is_kept = all(libc.mallopt(name, value) == 1 for name, value in settings.items())
    if is_kept:
        _ask_for_huge_pages(libc)
    return is_kept


def _ask_for_huge_pages(libc: ctypes.CDLL) -> None:
    """Grow the heap to half of the machine's memory, touching none of it, and ask for what it will be made of.

    It cannot be asked for later, as the heap grows: that is glibc's, which does so itself only for a variable of the
    environment (GLIBC_TUNABLES) that was there when the process began. Where memory counts that was not touched,
    nothing is asked for.
    """
    limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    is_strict = not _OVERCOMMIT.exists() or _OVERCOMMIT.read_text(encoding="ascii").strip() == "2"
    if is_strict or any(limit != resource.RLIM_INFINITY for limit in limits):
        return
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    libc.malloc.restype = ctypes.c_void_p
    start = libc.malloc(ctypes.c_size_t(size))
    if start is None:
        return
    first = -(-start // _HUGE_PAGE) * _HUGE_PAGE
    libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(start + size - first), mmap.MADV_HUGEPAGE)
    libc.free(ctypes.c_void_p(start))


def peak_memory(device: torch.device) -> int:
    """Most bytes so far: that tensors took on the GPU, or that this process took of the host's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
