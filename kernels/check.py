"""Every kernel against its reference on this device: `python -m kernels.check`; the trainer runs it before step 1.

Each operation has its comparisons in `kernels/<op>/check.py`, by the tolerance rule of `kernels/numerics.py`.
"""

import importlib
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import tyro

from kernels.assembler import use_right_assembler
from kernels.backend import BACKENDS, interpreted
from kernels.configuration import OPERATIONS, operations
from kernels.interpreter import leave_out_dead_work
from kernels.run import Run

WAY_ON = "--kernels torch, or KERNELS_BACKEND=torch in the environment, trains without these kernels"


@dataclass(frozen=True)
class Row:
    """One comparison of a kernel with its reference.

    Attributes:
        op: the operation.
        name: what was compared.
        error: see `kernels.numerics.Comparison`; infinite if the comparison raised an error.
        bound: the largest error that passes.
        seconds: duration, including a kernel's first compilation.
        message: the error raised instead of a comparison, or None.
    """

    op: str
    name: str
    error: float
    bound: float
    seconds: float
    message: str | None = None

    @property
    def passed(self) -> bool:
        """Whether the comparison succeeded, with an error within the bound."""
        return self.message is None and self.error <= self.bound

    def __str__(self) -> str:
        return f"{self.op}, {self.name}: " + (self.message or f"error {self.error:.2e}, allowed {self.bound:.2e}")


def run_checks(
    device: torch.device, backend: str = "triton", run: Run | None = None, ops: Sequence[str] = OPERATIONS
) -> list[Row]:
    """`each_checked`, of all operations in their order."""
    rows = [row for rows in each_checked(device, backend, run, ops) for row in rows]
    return sorted(rows, key=lambda row: OPERATIONS.index(row.op))


def each_checked(
    device: torch.device, backend: str = "triton", run: Run | None = None, ops: Sequence[str] = OPERATIONS
) -> Iterator[list[Row]]:
    """Compare every operation with its reference, several in parallel: most of the time is compilation.

    Args:
        device: where the kernels run.
        backend: the implementation to check; see `kernels.backend`.
        run: check only its operations, dtypes and sizes; None checks everything.
        ops: check only these operations.

    Yields:
        One row per comparison, of an operation once it is done. An exception in a check becomes a failed row; none is
        raised.
    """
    devices = [device] if device.type == "cuda" else []
    if backend == "triton":
        with suppress(Exception):  # once, before threads import it; the checks report its errors
            importlib.import_module("triton")
            if interpreted():
                leave_out_dead_work()
            else:
                use_right_assembler()
    with torch.random.fork_rng(devices):  # a run's random numbers must not depend on the check
        chosen = [op for op in operations(backend) if op in ops and (run is None or op in run.operations)]
        check = partial(_check_operation, device, backend, run)
        # threads only for Triton, which compiles for long; its interpreter has global state
        yield from _on_threads(check, chosen) if backend == "triton" and not interpreted() else map(check, chosen)


def _on_threads(check: Callable[[str], list[Row]], operations: Sequence[str]) -> Iterator[list[Row]]:
    with ThreadPoolExecutor(max(1, len(operations))) as pool:
        for done in as_completed([pool.submit(check, operation) for operation in operations]):
            yield done.result()


def _check_operation(device: torch.device, backend: str, run: Run | None, op: str) -> list[Row]:
    rows: list[Row] = []
    start = time.perf_counter()
    try:
        check = importlib.import_module(f"kernels.{op}.check")
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            for result in check.comparisons(device, backend, run):
                rows.append(Row(op, result.name, result.error, result.bound, time.perf_counter() - start))
                start = time.perf_counter()
        if not rows:
            raise RuntimeError("nothing was compared")  # noqa: TRY301 - an empty check fails too
    except Exception as error:  # noqa: BLE001 - compilation and launch can raise anything
        text = str(error).strip().splitlines()
        message = f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
        rows.append(Row(op, "check", float("inf"), 0.0, time.perf_counter() - start, message))
    return rows


def first_failure(rows: Sequence[Row]) -> str | None:
    """One line about the first failed row and what to do, or None if all passed."""
    failed = next((row for row in rows if not row.passed), None)
    return None if failed is None else f"kernel check failed: {failed}; {WAY_ON}"


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Run every kernel against its reference."""

    device: str | None = None
    """Where; by default the GPU, if there is one. On the CPU, Triton's kernels run in its interpreter."""
    backend: Literal[BACKENDS] = "triton"  # type: ignore[valid-type]  # tyro sees the values
    """Which implementation; see kernels.backend."""
    run: str | None = None
    """Check only what one training run launches, given as `kernels.run.Run` in JSON; the trainer does so."""
    op: tuple[Literal[OPERATIONS], ...] = OPERATIONS  # type: ignore[valid-type]  # likewise
    """Operations to check."""


def main() -> None:
    """Entry point. Exit status 1 if a comparison fails."""
    config = tyro.cli(CheckConfig, use_underscores=True)
    name = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch built without CUDA
        sys.exit(f"kernels.check: --device {name}: {str(error).splitlines()[0]}")
    if config.backend == "triton" and importlib.util.find_spec("triton") is None:
        sys.exit(f"kernels.check: Triton is not installed; {WAY_ON}")
    if config.backend == "triton" and device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    try:
        run = None if config.run is None else Run.from_json(config.run)
    except ValueError as error:
        sys.exit(f"kernels.check: --run: {error}")
    rows = run_checks(device, config.backend, run, config.op)
    print(_heading(device, config.backend))
    print_table(rows)
    if failure := first_failure(rows):
        # the last line of standard error is the result, which `gptbert.training.kernel_check` reads
        print(f"kernels.check: {failure}", file=sys.stderr)
        sys.exit(1)


def _heading(device: torch.device, backend: str) -> str:
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    how = " in its interpreter, which shows what the kernels compute but not that they compile for a GPU"
    return f"backend {backend} on {where}" + (how if backend == "triton" and interpreted() else "")


def print_table(rows: Sequence[Row]) -> None:
    """Print one line per comparison."""
    width = max((len(f"{row.op}, {row.name}") for row in rows), default=0)
    print(f"{'':{width}} {'error':>9} {'allowed':>9} {'seconds':>8}")
    for row in rows:
        verdict = "ok" if row.passed else f"FAILED {row.message or ''}".rstrip()
        print(f"{f'{row.op}, {row.name}':{width}} {row.error:9.2e} {row.bound:9.2e} {row.seconds:8.3f} {verdict}")


if __name__ == "__main__":
    main()
