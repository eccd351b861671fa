"""Freed memory that stays with the process."""

import platform
import subprocess
import sys

import pytest

from gptbert import memory

SCRIPT = """
import resource
import sys
import torch
from gptbert.memory import keep_freed_memory

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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_memory_is_taken_again_without_faults():
    faults = {}
    for choice in ("keep", "give back"):
        command = [sys.executable, "-c", SCRIPT, choice]
        faults[choice] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert faults["keep"] < faults["give back"] / 5


def test_elsewhere_nothing_changes(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert memory.keep_freed_memory() is False
