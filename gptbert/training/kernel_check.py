"""Checks the Triton kernels before a run, in a subprocess, while this process reads its inputs.

A kernel fault corrupts the CUDA context and may kill the process: in a subprocess, this process survives and reports
the error.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TextIO

import torch

import kernels
from gptbert.config import ModelConfig, TrainConfig
from gptbert.data.hybrid_plan import HybridPlan
from gptbert.distributed.world import World
from gptbert.errors import InputError
from gptbert.io.screen import log
from gptbert.model.gptbert import attention_shape, num_mixes
from kernels import depth_mix, dropout, gated_norm, normalize
from kernels.assembler import use_right_assembler
from kernels.attention_context.fused import is_fused
from kernels.backend import choose_backend
from kernels.check import WAY_ON
from kernels.run import Run
from kernels.wanted import FUSED, GROUPS, VARIANTS, is_wanted, use_fused

Failures = dict[tuple[str, str | None], str]  # by operation, and variant if it has several: what was wrong
SECONDS = 300  # at most, for all checks of a process together; they take some five without a compile cache
_LEAST = 60  # where --timeout is short


def kernel_settings(config: TrainConfig, model_config: ModelConfig, plan: HybridPlan, world: World) -> Run:
    """The settings that the kernels of a run must work with."""
    dtype = torch.bfloat16 if config.mixed_precision else torch.float32
    return Run(
        dtype=str(dtype).removeprefix("torch."),
        vocab_size=model_config.vocab_size,
        row_lengths=tuple(sorted(length + 1 for length in plan.row_lengths)),
        validation_length=config.seq_length + 1,
        mask_history=config.mask_history,
        lamb=config.optimizer == "lamb",
        buckets=world.world_size > 1,
        attention=_fused_attention(model_config, plan, world, dtype),
        gates=_fused_gates(model_config, world, dtype),
        dropouts=dropout.is_fused(world.device),
        norms=model_config.hidden_size if normalize.is_fused(world.device, model_config.hidden_size) else None,
        mixes=_fused_mixes(config, model_config, world, dtype),
    )


def _fused_attention(
    model_config: ModelConfig, plan: HybridPlan, world: World, dtype: torch.dtype
) -> tuple[int, int, int] | None:
    """`Run.attention`: None if no row length has fused attention."""
    shape = attention_shape(model_config, world.device)
    return shape if any(is_fused(world.device, dtype, length, *shape[1:]) for length in plan.row_lengths) else None


def _fused_gates(model_config: ModelConfig, world: World, dtype: torch.dtype) -> tuple[int | None, int | None] | None:
    """`Run.gates`: each is fused or not by its own width."""
    widths = model_config.hidden_size, model_config.intermediate_size
    attention, feed_forward = (width if gated_norm.is_fused(world.device, dtype, width) else None for width in widths)
    return (attention, feed_forward) if attention or feed_forward else None


def _fused_mixes(
    config: TrainConfig, model_config: ModelConfig, world: World, dtype: torch.dtype
) -> tuple[int, int] | None:
    """`Run.mixes`."""
    size, count = model_config.hidden_size, num_mixes(model_config)
    is_used = not config.is_sharded(world.world_size) and depth_mix.is_fused(world.device, dtype, size, count)
    return (size, count) if is_used else None


@contextmanager
def kernel_check(run: Run | None, device: torch.device, timeout: int) -> Iterator[Callable[[], Failures]]:
    """Context manager: the check runs in parallel to the block; its processes are killed at the end.

    Every rank checks its own GPU: any of them may be faulty. Fused operations have processes of their own, since a run
    can do without them. A rank waits no longer than half of `timeout` for all of them together, since the others wait
    for it: the first checks, which run in parallel, have two thirds of that, and other variants what is left.

    Args:
        run: the settings to check; None for a run without Triton kernels.
        device: this process's device.
        timeout: `--timeout`.

    Yields:
        A function that waits for the result. It returns the fused operations, or variants of them, that this run must
        do without, and raises InputError if another kernel differs from its reference or the check does not finish.
    """
    if run is None:
        yield dict
        return
    seconds = min(SECONDS, max(timeout / 2, _LEAST))
    end, of_first = time.monotonic() + seconds, seconds * 2 / 3
    with ExitStack() as stack:
        needed = [op for op in run.operations if op not in FUSED]
        check = stack.enter_context(_process(run, device, needed, of_first))
        groups = [[op for op in group if op in run.operations] for group in GROUPS]
        of_fused = [(group, stack.enter_context(_process(run, device, group, of_first))) for group in groups if group]
        yield partial(_finish_all, run, device, check, of_fused, end)


@contextmanager
def _process(run: Run, device: torch.device, ops: Sequence[str], seconds: float) -> Iterator[Callable[[], None]]:
    """Context manager: a check of these operations, which has so many seconds from now on.

    Yields:
        A function that waits for it, and raises InputError.
    """
    end = time.monotonic() + seconds
    paths = [str(Path(kernels.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-P", "-m", "kernels.check", "--device", str(device), "--run", run.to_json()]
    with tempfile.TemporaryFile("w+") as errors:  # not a pipe, which would have to be drained
        process = subprocess.Popen(
            [*command, "--op", *ops],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
        try:
            yield partial(_finish, process, errors, seconds, end)
        finally:
            process.kill()
            process.wait()


def _finish_all(
    run: Run,
    device: torch.device,
    check: Callable[[], None],
    of_fused: list[tuple[list[str], Callable[[], None]]],
    end: float,
) -> Failures:
    check()
    failures: Failures = {}
    for group, check_of_first in of_fused:
        failures |= _failures_of_group(run, device, group, check_of_first, end)
    return failures


def _failures_of_group(
    run: Run, device: torch.device, group: Sequence[str], check_of_first: Callable[[], None], end: float
) -> Failures:
    """Waits for a group's check; if it fails, checks one variant after another until one is right."""
    failures: Failures = {}
    for variant in VARIANTS.get(group[0], (None,)):
        try:
            if failures and variant is not None:
                left = max(end - time.monotonic(), 0)
                with _process(replace(run, attention_variant=variant), device, group, left) as check:
                    check()
            else:
                check_of_first()
        except InputError as error:
            reason = str(error).removesuffix(f"; {WAY_ON}")
            failures |= {(op, variant): reason for op in group}
        else:
            break
    return failures


def _finish(process: subprocess.Popen[bytes], errors: TextIO, seconds: float, end: float) -> None:
    try:
        status = process.wait(max(end - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        process.kill()  # the next one needs the device
        raise InputError(f"kernel check failed: it had no result after {seconds:.3g} seconds; {WAY_ON}") from None
    if status < 0:
        name = signal.Signals(-status).name
        raise InputError(f"kernel check failed: a kernel ended the process of the check ({name}); {WAY_ON}")
    if status:
        errors.seek(0)
        lines = [line.strip() for line in errors if line.strip()] or [f"exit status {status}"]
        last = lines[-1].removeprefix("kernels.check: ")  # its own message, or the last line of a traceback
        raise InputError(last if last.startswith("kernel check failed") else f"kernel check failed: {last}; {WAY_ON}")


def agree_on_fused(failures: Failures, world: World) -> None:
    """All ranks do without what failed its check on any of them, a variant of a fused operation or all of it.

    They also do without what any of them does not want, for instance because its host has another assembler: ranks
    that fuse different operations have their gradients in different places of the buffer that is summed. Every rank
    must call it.

    Args:
        failures: what `kernel_check` found on this rank.
        world: the run's processes.
    """
    own = [op for op in FUSED if is_wanted(op)]
    # of a rank with Triton's kernels that wants none: `prepare_kernels` has refused its assembler
    release = use_right_assembler() if not own and choose_backend(None, world.device) == "triton" else None
    everyone = world.all_gather((failures, own, release))
    failures = {key: reason for each, *_ in reversed(everyone) for key, reason in each.items()}
    unwilling = [(rank, wanted, release) for rank, (_, wanted, release) in enumerate(everyone) if {*own} - {*wanted}]
    common = [op for op in own if all(op in wanted for _, wanted, _ in unwilling)]
    right = {op: _right_variants(op, failures) for op in common}
    chosen = {op: variants[0] for op, variants in right.items() if variants}
    use_fused(chosen, {op: variant for op, variant in chosen.items() if variant is not None})
    if world.is_main:
        if unwilling:
            rank, _, release = unwilling[0]
            why = f" (its ptxas {release} is known to make wrong code of matrix products)" if release else ""
            without = ", ".join(op for op in own if op not in common)
            log(f"not fused in this run, as rank {rank} does without{why}: {without}")
        for (op, variant), reason in sorted(failures.items(), key=str):
            name = op if variant is None else f"{op} in its variant {variant}"
            log(f"{name} is not fused in this run: {reason}")


def _right_variants(op: str, failures: Failures) -> list[str | None]:
    """Variants of an operation that did not fail; of one without variants, None."""
    return [variant for variant in VARIANTS.get(op, (None,)) if (op, variant) not in failures]
