"""Over 2,000 steps on eight processes, memory and open files stay at their level after 400, and nothing is left behind.

Its name keeps it out of `make test`; `make soak` runs it.
"""

import contextlib
import json
import os
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from gptbert.monitoring.records import read_records
from tests.runs import MODEL, flags, process_ids, start, workers, write_inputs

RANKS, STEPS, WARM_UP_STEPS, SAVE_EVERY = 8, 2000, 400, 100
LARGEST_SLOPE = 1.0  # MB per 1,000 steps
SETTINGS = {
    "max_steps": STEPS,
    "batch_reduction": 1,  # constant batch size, so that memory has no reason to grow
    "seq_length": 16,
    "hybrid_mode": "rank",
    "mask_history": True,
    "log_every": 10,
    "validate_every": SAVE_EVERY,
    "validation_steps": 1,
    "save_every": SAVE_EVERY,
    "keep_checkpoints": 3,
}
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 (only read)


def measure(name):
    """Resident memory in MB and number of open files, by rank."""
    measured = {}
    for rank, process_id in workers(name).items():
        folder = Path(f"/proc/{process_id}")
        with contextlib.suppress(OSError):  # the process has ended
            pages = int((folder / "statm").read_text().split()[1])
            files = len(list((folder / "fd").iterdir()))
            measured[rank] = (pages * os.sysconf("SC_PAGE_SIZE") / 1e6, files)
    return measured


def watch(process, run):
    """Sample every second until the run ends; by rank, [samples, 3] of last recorded step, memory, open files."""
    samples = defaultdict(list)
    with ThreadPoolExecutor(1) as reader:  # drain the pipe: a full one would block the run
        output = reader.submit(process.communicate)
        while not output.done():
            metrics = run / "metrics.jsonl"
            step = read_records(metrics)[-1]["step"] if metrics.exists() and metrics.stat().st_size else 0
            for rank, (memory, files) in measure(run.name).items():
                samples[rank].append((step, memory, files))
            time.sleep(1)
    assert process.returncode == 0, output.result()[0][-3000:]
    return {rank: np.array(rows) for rank, rows in sorted(samples.items())}


def test_memory_and_open_files_stay_and_nothing_is_left(tmp_path, monkeypatch):
    inputs = write_inputs(tmp_path)
    (inputs / "model.json").write_text(json.dumps(MODEL | {"hidden_size": 16, "intermediate_size": 24}))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    shared = set(SHARED_MEMORY.iterdir())
    run = inputs / "runs" / "soak"
    began = time.monotonic()
    samples = watch(start(flags(inputs, name=run.name, **SETTINGS), RANKS), run)
    print(f"\n{STEPS:,} steps of {RANKS} processes in {time.monotonic() - began:,.0f} s")
    assert list(samples) == list(range(RANKS))
    slopes, opened = {}, {}
    for rank, rows in samples.items():
        steps, memory, files = rows[(rows[:, 0] >= WARM_UP_STEPS) & (rows[:, 0] < STEPS)].T  # without the shutdown
        slopes[rank] = np.polyfit(steps, memory, 1)[0] * 1000
        middle = (WARM_UP_STEPS + STEPS) / 2
        halves = steps < middle, steps >= middle
        opened[rank] = [int(files[half].min()) for half in halves]  # the minimum, since saves open more for a moment
        print(
            f"rank {rank}: {slopes[rank]:+.3f} MB in 1,000 steps, {memory[0]:.1f} MB at first and {memory[-1]:.1f} at "
            f"last, {opened[rank][0]} and {opened[rank][1]} open files, {len(steps)} samples"
        )
    assert max(slopes.values()) < LARGEST_SLOPE
    assert all(first == second for first, second in opened.values())
    assert not process_ids(run.name)
    written = {"config.json", "tokenizer.json", "metrics.jsonl", "samples.jsonl", "checkpoints"}
    assert {path.name for path in run.iterdir()} == written
    kept = [f"step_{STEPS - SAVE_EVERY * back:08d}" for back in (2, 1, 0)]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == kept
    assert not set(SHARED_MEMORY.iterdir()) - shared
    # torchrun's log folder and torch.compile's code folder, which torch does not delete
    left = [path.name for path in temporary.iterdir() if not path.name.startswith(("torchelastic_", "torchinductor_"))]
    assert not left
