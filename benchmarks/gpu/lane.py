"""The GPU tests, `make test-gpu`, counted as they finish; failures are said to be all only when all have finished."""

import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Iterator
from typing import Any

from benchmarks import ROOT
from benchmarks.gpu.settings import Settings

FOLDER = "tests/gpu"
WORKERS = 6
LANE = {"GPTBERT_TEST_DEVICE": "cuda"}  # see tests/README.md
OUTCOME = re.compile(r"\b(PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)\b")
NAME = re.compile(rf"{FOLDER}/\S+")
FINISHED = (0, 1)  # pytest's status: all passed, some failed
KEPT_LINES = 400  # of what failed tests say


def measure(settings: Settings) -> Iterator[dict[str, Any]]:
    """Numbers of tests by outcome, and the names of failed tests."""
    if not any((ROOT / FOLDER).glob("test_*.py")):
        yield {"summary": f"{FOLDER} has no tests, so none ran"}
        return
    command = [sys.executable, "-m", "pytest", FOLDER, "-v", "-rs", "-p", "no:cacheprovider", "-o", "addopts="]
    if not settings.rehearse and importlib.util.find_spec("xdist"):
        command += ["-n", str(WORKERS), "--dist", "worksteal"]
    outcomes: Counter[str] = Counter()
    failed: list[str] = []
    said: deque[str] = deque(maxlen=KEPT_LINES)
    last = ""
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | LANE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
            if (outcome := OUTCOME.search(line)) and (name := NAME.search(line)) and "%]" in line:
                outcomes[outcome[1].lower()] += 1
                if outcome[1] in {"FAILED", "ERROR"}:
                    failed.append(name[0])
                yield _found(outcomes, failed, said)
            elif line.strip():
                said.append(line.rstrip())
    found = _found(outcomes, failed, said) | {"said": last}
    if process.returncode in FINISHED and (outcomes["passed"] or failed):  # if all were skipped, there is no result
        found["failed"] = len(failed)
    yield found


def _found(outcomes: Counter[str], failed: list[str], said: deque[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"outcomes": dict(outcomes), "failures": failed}
    found["summary"] = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items()) or "no test ran"
    return found | ({"output": list(said)} if failed else {})
