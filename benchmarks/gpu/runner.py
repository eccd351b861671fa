"""Runs parts, each in a separate process with a time limit, and keeps the report up to date while they run."""

import importlib.util
import itertools
import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress

from benchmarks import ROOT
from benchmarks.gpu import child
from benchmarks.gpu.report import Report
from benchmarks.gpu.settings import WHOLE_MINUTES, Part, Settings

POLL_SECONDS = 0.1
LEAST_SECONDS = 5.0  # with less than this left, no part is started
TAIL_LINES = 12  # of a failed part's output

DONE, RUNNING, FAILED, KILLED, LEFT_OUT = "done", "running", "failed", "killed", "left out"


class Process:
    """The process of a part; killed with its children at its time limit."""

    def __init__(self, part: Part, settings: Settings) -> None:
        self.part = part
        self.seconds = 0.0
        self._settings = settings
        self._result = settings.result(part.name)
        self._log = settings.work / "logs" / f"{part.file_name}.log"
        self._read: dict = {}
        self._read_at = 0
        self._start = 0.0
        self._process: subprocess.Popen[bytes] | None = None

    def prepare(self) -> None:
        """Let it import what it needs, and wait."""
        for folder in ("parts", "logs", "inductor", "triton"):
            (self._settings.work / folder).mkdir(parents=True, exist_ok=True)
        self._result.unlink(missing_ok=True)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                child.command(self.part, self._settings, self._result), cwd=ROOT, env=environment(self._settings),
                stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.PIPE, start_new_session=True,
            )  # fmt: skip

    def begin(self, seconds: float) -> None:
        """Let it measure, for this long at most."""
        if self._process is None:
            self.prepare()
        self.seconds, self._start = seconds, time.monotonic()
        with suppress(BrokenPipeError), self._process.stdin as line:  # it may have ended already
            line.write(b"begin\n")

    @property
    def spent(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self._start

    def kill(self) -> None:
        """Kill the process and its children, if any are alive."""
        if self._process is None:
            return
        with suppress(ProcessLookupError, PermissionError):  # macOS raises the latter for a group that has ended
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def entry(self) -> dict:
        """The part's state for the report; a part that has ended or exceeded its limit is killed with its children."""
        status, message = RUNNING, ""
        if self._process.poll() is not None:
            status = DONE if self._process.returncode == 0 else FAILED
            message = "" if status == DONE else f"exit status {self._process.returncode}"
        elif self.spent > self.seconds:
            status, message = KILLED, f"over its time of {self.seconds:.0f} s"
        if status != RUNNING:
            self.kill()
        found = {"status": status, "seconds": round(self.spent, 1), "message": message, "result": self._latest()}
        if status in {FAILED, KILLED}:
            found["log"] = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
        return found

    def _latest(self) -> dict:
        """Its results so far."""
        with suppress(FileNotFoundError):
            written = self._result.stat().st_mtime_ns
            if written != self._read_at:
                self._read, self._read_at = json.loads(self._result.read_text(encoding="utf-8")), written
        return self._read


def environment(settings: Settings) -> dict[str, str]:
    """The environment of all parts: shared compilation caches; in a rehearsal no GPU, else compiled kernels."""
    caches = {"TORCHINDUCTOR_CACHE_DIR": settings.work / "inductor", "TRITON_CACHE_DIR": settings.work / "triton"}
    found = {**os.environ, **{name: str(path) for name, path in caches.items()}, "PYTHONUNBUFFERED": "1"}
    if settings.rehearse:
        return found | {"CUDA_VISIBLE_DEVICES": "-1", "HIP_VISIBLE_DEVICES": "-1", "OMP_NUM_THREADS": "1"}
    found.pop("TRITON_INTERPRET", None)
    return found


def missing(part: Part) -> list[str]:
    """The packages that a part needs and that are missing."""
    return [package for package in part.needs if importlib.util.find_spec(package) is None]


def limit(part: Part, settings: Settings, deadline: float) -> float:
    """A part's time limit in seconds; shorter runs skip parts instead, since compilation does not get faster."""
    longer = max(1.0, settings.minutes / WHOLE_MINUTES)
    return min(part.seconds * longer, deadline - time.monotonic())


def run(stages: Sequence[list[Part]], settings: Settings, report: Report) -> None:
    """Run the stages in sequence until the time is over; print a line for each finished part.

    A part that is alone in its stage imports what it needs during the stage before.
    """
    deadline = time.monotonic() + 60 * settings.minutes
    processes = [[Process(part, settings) for part in stage] for stage in stages]
    for stage, following in itertools.pairwise([*processes, []]):
        run_stage(stage, following, settings, report, deadline)
        report.keep_logs(settings.work / "logs")
        if len(stage) > 1:
            forget_tuning(settings)


def run_stage(
    stage: list[Process], following: list[Process], settings: Settings, report: Report, deadline: float
) -> None:
    """Run parts in parallel; write the report when one has new results or ends.

    Args:
        stage: the parts.
        following: those of the next stage.
        settings: of the measurement.
        report: gets the results.
        deadline: by `time.monotonic`.
    """
    running: list[Process] = []
    try:
        for process in stage:
            part, seconds = process.part, limit(process.part, settings, deadline)
            if packages := missing(part):
                names = " and ".join(packages)
                _left_out(report, part, f"{names} {'is' if len(packages) == 1 else 'are'} not installed")
            elif seconds < LEAST_SECONDS:
                process.kill()
                _left_out(report, part, f"the {settings.minutes:g} minutes were over")
            else:
                running.append(process)
                process.begin(seconds)
        if len(following) == 1 and not missing(following[0].part):
            following[0].prepare()
        while running:
            time.sleep(POLL_SECONDS)
            for process in list(running):
                entry = process.entry()
                report.put(process.part.name, entry)
                if entry["status"] != RUNNING:
                    running.remove(process)
                    say(process.part.name, entry)
    finally:
        for process in running:  # Ctrl-C, SIGTERM
            process.kill()
            entry = process.entry()
            report.put(process.part.name, entry | {"status": KILLED, "message": "the measurement was stopped"})
        for process in following if running else ():
            process.kill()


def forget_tuning(settings: Settings) -> None:
    """Have Inductor choose again among compiled variants of a kernel: others were running while it timed them."""
    for choice in (settings.work / "inductor").rglob("*.best_config"):
        choice.unlink()


def _left_out(report: Report, part: Part, reason: str) -> None:
    entry = {"status": LEFT_OUT, "seconds": 0.0, "message": reason, "result": {}}
    report.put(part.name, entry)
    say(part.name, entry)


def say(name: str, entry: dict) -> None:
    """Print one line about a finished part."""
    reason = f": {entry['message']}" if entry["message"] else ""
    summary = f"; {entry['result']['summary']}" if entry["result"].get("summary") else ""
    print(f"{name}: {entry['status']} after {entry['seconds']:.1f} s{reason}{summary}", flush=True)
    for line in entry.get("log", [])[-3:]:
        print(f"    {line}", flush=True)
