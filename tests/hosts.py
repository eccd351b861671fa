"""Two hosts on one machine: connected network namespaces, in which runs start as on a cluster."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runs import ROOT

RECIPE = "configs/runs/hosts.sh"
ADDRESSES = ("10.77.0.1", "10.77.0.2")


class Hosts:
    """Two network namespaces, named after this process so that parallel tests do not collide."""

    def __init__(self) -> None:
        self.names = [f"gptbert-{os.getpid()}-{index}" for index in range(2)]
        self.processes: list[subprocess.Popen] = []

    def open(self) -> None:
        """Create the namespaces and the link.

        Raises:
            FileNotFoundError: there is no `ip` command.
            subprocess.CalledProcessError: `ip` failed; `stderr` has the reason.
        """
        first, second = self.names
        for name in self.names:
            _ip("netns", "add", name)
        _ip("link", "add", "wire", "netns", first, "type", "veth", "peer", "name", "wire", "netns", second)
        for name, address in zip(self.names, ADDRESSES, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", "wire")
            _ip("-n", name, "link", "set", "lo", "up")
            # give up unanswered connections after half a minute instead of a quarter of an hour
            _ip("netns", "exec", name, "sh", "-c", "echo 6 > /proc/sys/net/ipv4/tcp_retries2")
        self.set_link("up")

    def set_link(self, state: str) -> None:
        """Set the second host's end of the link "down" or "up"."""
        for name in self.names if state == "up" else self.names[1:]:
            _ip("-n", name, "link", "set", "wire", state)

    def start(self, arguments: list[str], logs: Path, restarts: int = 0) -> list[subprocess.Popen]:
        """Run the recipe with these extra flags on both hosts; see `start_one`."""
        return [self.start_one(index, arguments, logs, restarts) for index in range(2)]

    def start_one(self, index: int, arguments: list[str], logs: Path, restarts: int = 0) -> subprocess.Popen:
        """Run the recipe on one host with two processes; output goes into `logs`, one file per host."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        settings = {"PATH": path, "NPROC_PER_NODE": "2", "MAX_RESTARTS": str(restarts), "OMP_NUM_THREADS": "1"}
        command = ["ip", "netns", "exec", self.names[index], RECIPE, ADDRESSES[0], *arguments]
        logs.mkdir(exist_ok=True)
        with (logs / f"{index}.log").open("w") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | settings, stdout=log, stderr=subprocess.STDOUT
            )
        self.processes.append(process)
        return process

    def process_ids(self, *indices: int) -> list[int]:
        """Ids of all processes on these hosts (default: both), whatever started them."""
        names = [self.names[index] for index in indices] or self.names
        return [int(line) for name in names for line in _ip("netns", "pids", name).split()]

    def kill(self, *indices: int) -> None:
        """Kill all processes on these hosts (default: both) at once, like a power failure."""
        while left := self.process_ids(*indices):
            for process_id in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process_id, signal.SIGKILL)
            for process in self.processes:
                process.poll()

    def close(self) -> None:
        """Kill remaining processes and delete the namespaces and the link."""
        self.kill()
        for process in self.processes:
            process.wait()
        for name in self.names:
            _ip("netns", "delete", name)


@contextlib.contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Context manager: two hosts, removed at exit; skips the test if the machine cannot create namespaces."""
    hosts = Hosts()
    try:
        hosts.open()
    except (OSError, subprocess.CalledProcessError) as error:
        with contextlib.suppress(OSError, subprocess.CalledProcessError):  # it may be partly created
            hosts.close()
        pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', None) or error}".strip())
    try:
        yield hosts
    finally:
        hosts.close()


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout
