"""Every kernel against its reference, and the time that a run waits for the check before its first step."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import ROOT, machine
from benchmarks.bench_train_step import Case, training
from benchmarks.gpu.cases import README_COMMAND
from benchmarks.gpu.settings import Settings
from gptbert.config import ModelConfig
from gptbert.data.hybrid_plan import HybridPlan
from gptbert.distributed.world import connect
from gptbert.training.kernel_check import kernel_check, kernel_settings
from gptbert.training.preparation import prepare_kernels
from kernels.check import Row, each_checked, first_failure

TIMEOUT = 100.0


def measure(settings: Settings) -> Iterator[dict[str, Any]]:
    """Results of `python -m kernels.check`: counts, seconds by operation, and failures; after each operation."""
    del settings
    here = machine.device()
    start = time.perf_counter()
    rows: list[Row] = []
    by_operation: dict[str, float] = {}
    for checked in each_checked(here, "triton" if here.type == "cuda" else "torch"):
        rows += checked
        by_operation[checked[0].op] = sum(row.seconds for row in checked)
        seconds = time.perf_counter() - start
        failures = [str(row) for row in rows if not row.passed]
        yield {
            "comparisons": len(rows), "failed": len(failures), "failures": failures, "seconds": seconds,
            "seconds_by_operation": by_operation, "first_failure": first_failure(rows),
            "summary": f"{len(rows)} comparisons of {', '.join(by_operation)}, {len(failures)} out of their bounds, "
            f"in {seconds:.0f} s",
        }  # fmt: skip


def before_a_run(settings: Settings) -> Iterator[dict[str, Any]]:
    """Seconds that the README's command waits for its check: with an empty kernel cache, then with a full one."""
    found: dict[str, Any] = {}
    said: list[str] = []
    with tempfile.TemporaryDirectory(dir=settings.work) as cache:
        for state in ("cold", "warm"):
            found[f"{state}_seconds"] = _seconds_in_a_process(cache)
            said.append(f"{state} {found[f'{state}_seconds']:.1f} s")
            found["summary"] = ", ".join(said)
            yield found


def _seconds_in_a_process(cache: str) -> float:
    """Seconds of the check in a new process, with this kernel cache."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.check"],
        cwd=ROOT, env={**os.environ, "TRITON_CACHE_DIR": str(Path(cache) / "triton")},
        stdout=subprocess.PIPE, text=True, check=True, timeout=TIMEOUT,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def seconds_before_a_run() -> float:
    """Seconds of the check as started by a run, which reads its inputs meanwhile."""
    case = Case(README_COMMAND.objective, README_COMMAND.seq_length, README_COMMAND.rows)
    config = training(case, steps=1)
    model_config = ModelConfig.from_json(ROOT / "configs" / f"{README_COMMAND.model}.json")
    with connect(config) as world:
        machine.synchronize()  # initialize the device
        start = time.perf_counter()
        backend = prepare_kernels(config, world)
        run = kernel_settings(config, model_config, HybridPlan(config, world.world_size), world)
        with kernel_check(run if backend == "triton" else None, world.device, config.timeout) as finish:
            finish()
        return time.perf_counter() - start


if __name__ == "__main__":
    print(json.dumps(seconds_before_a_run()))
