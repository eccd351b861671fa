"""Training steps of the trainer on random documents, and plain PyTorch steps in the same process."""

import dataclasses
import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Self
from unittest.mock import patch

import torch

from benchmarks import ROOT, machine
from benchmarks.bench_train_step import Case, labeled_fraction, random_trainer, training
from benchmarks.gpu.cases import CASES, README_COMMAND, WAYS, StepCase
from benchmarks.gpu.hardware import data_sheet_flops
from benchmarks.gpu.profile import profile
from benchmarks.gpu.settings import Settings
from gptbert.config import ModelConfig
from gptbert.data.prefetcher import Prefetcher
from gptbert.distributed.memory import peak_memory
from gptbert.distributed.world import connect
from gptbert.monitoring.flops import measure_matmul_flops, training_flops
from gptbert.trainer import Trainer
from kernels.backend import set_default_backend

WARM_UPS = 3  # after the first step
ROUNDS, ROUND_STEPS = 3, 8
HOST_STEPS, PROFILED_STEPS = 4, 3
ALSO_LAUNCHED = README_COMMAND.name  # the only case measured in all ways, for lack of time
TOY_CHANGES = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 256,
    "position_bucket_size": 8,
}  # fmt: skip
TOY_ROWS = 4
MASK_P = 0.225  # the mean of a run's; one that falls within 35 steps would change shapes, and so record graphs anew


def measure(settings: Settings, name: str) -> Iterator[dict[str, Any]]:
    """Figures of a case: `ours`, with the device's kernels and CUDA graphs; then `plain`, with none of them.

    Of one case also `launched`, as ours without CUDA graphs.
    """
    case = CASES[name]
    found: dict[str, Any] = {"case": dataclasses.asdict(case)}
    for way in WAYS:
        if way == "launched" and name != ALSO_LAUNCHED:
            continue
        found[way] = figures(case, settings, way)
        if way == "ours":
            found["summary"] = f"{found[way]['ms']:.1f} ms, {found[way]['tokens_per_second']:,.0f} tokens/s"
        yield found
    times = found["plain"]["ms"] / found["ours"]["ms"]
    found["summary"] += f", {times:.2f} times the plain way"
    yield found


def compile_first(settings: Settings, names: list[str]) -> Iterator[dict[str, Any]]:
    """Two steps of each case, to fill the caches with all code that later processes need."""
    seconds = {}
    for name in names:
        start = time.perf_counter()
        with TrainingSteps(CASES[name], settings, "ours", steps=2) as steps:
            steps.take(2)
            machine.synchronize()
        seconds[name] = time.perf_counter() - start
        yield {"seconds": dict(seconds), "summary": ", ".join(f"{each:.0f} s" for each in seconds.values())}


class TrainingSteps:
    """Context manager: a trainer on random documents; frees its memory at the end.

    Args:
        case: the training step.
        settings: of the measurement.
        way: one of `WAYS`.
        steps: maximum number of steps.
    """

    def __init__(self, case: StepCase, settings: Settings, way: str, steps: int) -> None:
        self.model_config, self.case = shape(case, settings)
        options = WAYS[way]
        set_default_backend(options["backend"])
        self.config = training(
            self.case, steps=steps, compile=options["compile"], kernels=options["backend"] or "auto",
            cuda_graph=options["cuda_graph"], cpu_threads=1 if settings.rehearse else 0,
            mask_p_start=MASK_P, mask_p_end=MASK_P,
        )  # fmt: skip
        self.number_of_steps = steps
        self._rehearse = settings.rehearse
        self.trainer: Trainer | None = None

    def __enter__(self) -> Self:
        self._world = connect(self.config)
        with without_code() if self._rehearse else nullcontext():
            self.trainer = random_trainer(self.config, self.model_config, self._world.__enter__())
        self._rows = Prefetcher(self.trainer.loader.load, 0, self.number_of_steps)
        return self

    def __exit__(self, *error: object) -> None:
        self._rows.__exit__(*error)
        self.trainer = self._rows = None
        self._world.__exit__(None, None, None)
        set_default_backend(None)
        gc.collect()
        if machine.device().type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def take(self, count: int) -> torch.Tensor:
        """Run steps without a device sync; returns the last gradient norm, on the device."""
        for _ in range(count):
            norm = self.trainer.train_step(self._rows.get(self.trainer.step))
        return norm


def figures(case: StepCase, settings: Settings, way: str) -> dict[str, Any]:
    """Figures of a case in one of the ways.

    Returns:
        `ms`: per step, in the median round of several steps without a device sync; `rounds_ms`: per step of each round;
        `host_ms`: until a step that starts on an idle device has launched all its kernels (if the device's queue is
        full, the host blocks); `busy_ms`, `launches`, `kernels`: see `benchmarks.gpu.profile`; `mfu`: relative to the
        best rate of torch.mm right after; `mfu_data_sheet`; `peak_gb`: of tensors; `first_step_seconds`: from the
        model's creation to the end of the first step, without the kernel check.
    """
    round_steps = settings.times(round(ROUND_STEPS * WAYS[way]["share"]), 1)
    profiled_steps = 1 if settings.rehearse else PROFILED_STEPS  # the profiler's own work on a CPU takes seconds
    count = 1 + WARM_UPS + ROUNDS * round_steps + HOST_STEPS + profiled_steps
    start = time.perf_counter()
    with TrainingSteps(case, settings, way, count) as steps:
        steps.take(1)
        machine.synchronize()
        first = time.perf_counter() - start
        steps.take(WARM_UPS)
        rounds = [machine.seconds(lambda: steps.take(round_steps)) / round_steps for _ in range(ROUNDS)]
        host = [launch_seconds(lambda: steps.take(1)) for _ in range(HOST_STEPS)]
        peak = peak_memory(machine.device())
        kernels = profile(lambda: steps.take(1), profiled_steps)
        share = statistics.mean(labeled_fraction(steps.trainer, step) for step in range(0, count, max(1, count // 4)))
        tokens = steps.case.rows * steps.case.seq_length
        flops = tokens * training_flops(steps.model_config, steps.case.seq_length, share)
    rate = measure_matmul_flops(machine.device(), torch.bfloat16, quick=settings.rehearse)
    seconds = statistics.median(rounds)
    data_sheet = data_sheet_flops(machine.hardware())
    return {
        "ms": 1e3 * seconds,
        "rounds_ms": [1e3 * each for each in rounds],
        "tokens_per_second": tokens / seconds,
        "mfu": flops / seconds / rate,
        "mfu_data_sheet": flops / seconds / data_sheet if data_sheet else None,
        "product_tflops": rate / 1e12,
        "labeled_fraction": share,
        "host_ms": 1e3 * statistics.median(host),
        "peak_gb": peak / 1e9,
        "first_step_seconds": first,
        **kernels,
    }


@contextmanager
def without_code() -> Iterator[None]:
    """Context manager: torch.compile traces but generates no code, which would take longer than the rehearsal."""
    compiled = torch.nn.Module.compile
    with patch.object(torch.nn.Module, "compile", functools.partialmethod(compiled, backend="eager")):
        yield


def launch_seconds(action: Callable[[], object]) -> float:
    """Host seconds of an action that starts on an idle device; then a device sync."""
    machine.synchronize()
    start = time.perf_counter()
    action()
    seconds = time.perf_counter() - start
    machine.synchronize()
    return seconds


def shape(case: StepCase, settings: Settings) -> tuple[ModelConfig, Case]:
    """The model's and the step's settings; toy sizes in a rehearsal."""
    model = ModelConfig.from_json(ROOT / "configs" / f"{case.model}.json")
    if not settings.rehearse:
        return model, Case(case.objective, case.seq_length, case.rows)
    return dataclasses.replace(model, **TOY_CHANGES), Case(case.objective, case.seq_length // 4, TOY_ROWS)
