"""The process keeps freed memory instead of returning it to the system."""

import platform
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from gptbert.distributed import memory, world

SCRIPT = """
import resource
import sys
import torch
from gptbert.distributed.memory import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
torch.ones(2**24)  # 64 MB
faults = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt]
for _ in range(20):
    torch.ones(2**24)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
# the fewest: where memory is short, the system takes pages back by itself
print(min(after - before for before, after in zip(faults, faults[1:])))
"""

HEAP = """
import resource
import sys
from gptbert.distributed.memory import keep_freed_memory

if sys.argv[1] == "limited":
    resource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))
assert keep_freed_memory()
mappings = open("/proc/self/smaps").read().split("VmFlags: ")
# that of the heap's larger part says in its flags whether it asked for huge pages
print(any("[heap]" in before and " hg" in flags for before, flags in zip(mappings, mappings[1:])))
"""

only_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")


@only_glibc
def test_memory_is_taken_again_without_faults():
    faults = {}
    for choice in ("keep", "give back"):
        command = [sys.executable, "-c", SCRIPT, choice]
        faults[choice] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert faults["keep"] < faults["give back"] / 5


@only_glibc
@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="the system has no such pages")
@pytest.mark.parametrize(("choice", "asked"), [("free", "True"), ("limited", "False")])
def test_the_heap_asks_for_huge_pages_unless_memory_that_is_not_touched_counts(choice, asked):
    command = [sys.executable, "-c", HEAP, choice]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == asked


@pytest.mark.parametrize(("huge_pages", "calls"), [(True, 1), (False, 0)])
def test_with_no_huge_pages_the_allocator_is_told_nothing(monkeypatch, make_config, huge_pages, calls):
    told = Mock()
    monkeypatch.setattr(world, "keep_freed_memory", told)
    with world.connect(make_config(device="cpu", cpu_threads=1, huge_pages=huge_pages)):
        assert told.call_count == calls


def test_elsewhere_nothing_changes(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert memory.keep_freed_memory() is False
