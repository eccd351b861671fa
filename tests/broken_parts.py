"""Failing parts of a measurement, for tests/test_gpu_runner.py."""

import os
import subprocess
import sys
import time
from pathlib import Path


def right(settings, value=7):
    yield {"value": 0}
    yield {"value": value, "summary": f"found {value}"}


def noting(settings, times):
    """Notes when it begins and ends."""
    for what in ("begin", "end"):
        with Path(times).open("a") as file:
            file.write(f"{what} {time.time()}\n")
        yield {"value": 1}


def crashing(settings):
    yield {"value": 1}
    print("on the way", file=sys.stderr)
    raise RuntimeError("an illegal memory access was encountered")


def aborting(settings):
    yield {"value": 1}
    os.abort()


def hanging(settings, pid_file):
    """Hangs after its first result, with a child process that hangs too."""
    yield {"value": 1, "summary": "half"}
    beside = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(pid_file).write_text(f"{beside.pid}")
    time.sleep(600)


def waiting_for(settings, mine, other):
    """Ends only if a different part runs at the same time."""
    Path(mine).touch()
    while not Path(other).exists():
        time.sleep(0.02)
    yield {"value": 1}
