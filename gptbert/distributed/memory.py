"""Peak memory, and an allocator setting that lets a step on a CPU reuse the memory that the last one freed."""

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
_PAD = 2**28  # the heap grows by at least this many bytes
_HUGE_PAGE = 2**21
_OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")  # 2: no overcommit


def keep_freed_memory() -> bool:
    """Have glibc keep freed memory instead of returning it to the system, for the rest of this process.

    A step allocates and frees gigabytes of tensors. Pages that were returned must be faulted in and zeroed again, 4 KB
    at a time, which takes some 4 % of a step. All threads share one arena, since per-thread arenas for gloo's threads
    fragment: 2.3 MB in 1,000 steps with eight processes. If transparent huge pages (2 MB) are in madvise mode, the heap
    requests them: fewer TLB misses save 1 % of a step at T = 128 and 3 % at T = 512.

    With `--no_huge_pages` a run does without.

    Returns:
        Whether it took effect; without glibc nothing changes.
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
    """Grow the heap to half of the machine's memory, without touching it, and request huge pages for that range.

    It cannot be done later, as the heap grows: glibc grows it, and requests huge pages only if GLIBC_TUNABLES was set
    when the process started. Where untouched memory counts toward a limit, nothing is requested.
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
    """Peak bytes so far: of tensors on the GPU, or of this process's resident host memory.

    On Apple's MPS, which records no peak, what its driver has allocated by now, freed tensors included.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
