"""A training step, part by part, relative to the machine's peak: `python -m benchmarks.bench_train_step [--json]`.

`gptbert bench` is the same.

It measures everything in a step of the trainer: waiting for rows, masking, forward, backward, all-reduce over ranks,
clipping, LAMB and the moving average. Model FLOP utilization (MFU) is the FLOPs of the needed matrix products
(`gptbert.monitoring.flops`) over the time, over the best rate of torch.mm measured in the same run.
"""

import dataclasses
import json
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.distributed.elastic.utils.distributed import get_free_port

from benchmarks import machine
from benchmarks.stopwatch import PARTS, Stopwatch
from gptbert.command_line import run_command
from gptbert.config import ModelConfig, TrainConfig
from gptbert.data.hybrid_plan import HybridPlan
from gptbert.data.inputs import Inputs
from gptbert.data.prefetcher import Prefetcher
from gptbert.data.token_store import TokenStore
from gptbert.distributed.hardware import usable_cores
from gptbert.distributed.memory import peak_memory
from gptbert.distributed.world import World, connect
from gptbert.errors import InputError
from gptbert.io.screen import table_row
from gptbert.monitoring.flops import forward_flops, measure_matmul_flops, training_flops
from gptbert.trainer import Trainer
from gptbert.training import compile_choice
from gptbert.training.preparation import prepare_cpp_kernels, prepare_kernels
from kernels import IGNORE_INDEX
from kernels.padding import padded_length

WARM_UPS = 2
TOKENS = 2_000_000
TOKENS_OF_A_STEP = 4096  # in most cases; smaller steps are measured more often
LEAST_WIDTH = 7  # of a column


@dataclass(frozen=True)
class Case:
    """The shape of a training step, and its number of processes; hybrid is a quarter MLM, the default of `TrainConfig`.

    Sizes that are None come from the model of `--config_file`.
    """

    objective: Literal["MLM", "CLM", "hybrid"]
    seq_length: int
    rows: int
    ranks: int = 1
    vocab_size: int | None = None
    hidden_size: int | None = None
    num_hidden_layers: int | None = None

    @property
    def name(self) -> str:
        """Objective, T, global B, the number of processes if several, and other distinguishing settings."""
        ranks = f" {self.ranks} ranks" if self.ranks > 1 else ""
        sizes = {"D": self.hidden_size, "L": self.num_hidden_layers, "V": self.vocab_size}
        own = "".join(f" {letter}={size}" for letter, size in sizes.items() if size is not None)
        return f"{self.objective} T={self.seq_length} B={self.rows}{ranks}{own}"

    def model(self, config: ModelConfig) -> ModelConfig:
        """`config` with this case's sizes; head width and inner width over D stay the same."""
        own = {"vocab_size": self.vocab_size, "num_hidden_layers": self.num_hidden_layers}
        if self.hidden_size is not None:
            inner = config.intermediate_size * self.hidden_size // config.hidden_size
            own["hidden_size"], own["intermediate_size"] = self.hidden_size, padded_length(inner)
            own["num_attention_heads"] = config.num_attention_heads * self.hidden_size // config.hidden_size
        return dataclasses.replace(config, **{name: size for name, size in own.items() if size is not None})


CASES = (
    *(Case("MLM", 128, 32), Case("CLM", 128, 32), Case("MLM", 512, 8), Case("CLM", 512, 8)),
    *(Case("MLM", 128, 32, ranks=2), Case("CLM", 128, 32, ranks=2), Case("hybrid", 128, 32)),
    # the start of a batch-size schedule: a quarter of the rows
    *(Case("MLM", 128, 8), Case("CLM", 128, 8), Case("hybrid", 128, 8), Case("MLM", 512, 2)),
    # a large vocabulary, in the same model and in one for a laptop
    *(Case("MLM", 128, 32, vocab_size=32768), Case("CLM", 128, 32, vocab_size=32768)),
    *(Case(objective, 128, 32, 1, 32768, 256, 6) for objective in ("MLM", "CLM")),
)
_MASKED_QUARTERS = {"MLM": 4, "CLM": 0, "hybrid": 1}


@dataclass(frozen=True, kw_only=True)
class StepBenchConfig:
    """Measure training steps of one process, part by part."""

    config_file: Path = Path("configs/small.json")
    """Model."""
    steps: int = 6
    """Steps measured per case, after two warm-up steps; up to four times as many of smaller steps."""
    compile: bool = True
    """Compile the model's blocks."""
    activation_checkpointing: bool = False
    """Recompute the blocks' activations in the backward."""
    cpu_threads: int = 0
    """Threads on a CPU; 0: all cores."""
    rates: int = 3
    """Measurements of torch.mm after the steps, of which the best counts: the machine may be busy. 0: a quick one."""
    match: str = ""
    """The case of this name, such as "MLM T=128 B=32", or else all whose name contains it."""
    json: bool = False
    """Print one JSON object instead of a table."""
    save: bool = False
    """Write the JSON object to this machine's file in benchmarks/results/, for `benchmarks.report`."""


@dataclass(frozen=True)
class Result:
    """Figures of a case.

    Attributes:
        case: the measured case.
        milliseconds: median of a step.
        tokens_per_second: at that time per step.
        mfu: needed FLOPs over time over `measure_matmul_flops`.
        product_gflops: the best rate of torch.mm right after the steps, of all processes together.
        start_seconds: until the end of the first step: model, compilation, warm-up.
        peak_gb: peak memory of the first process in 10^9 bytes (on a GPU: device memory).
        parts: milliseconds of each of PARTS in the median step; their sum is the step.
        labeled_fraction: of the positions; determines the needed FLOPs.
        cross_entropy_share: fraction of the needed FLOPs in products with the output matrix.
        rows_ms: mean milliseconds to build a step's rows, on the background thread.
    """

    case: Case
    milliseconds: float
    tokens_per_second: float
    mfu: float
    product_gflops: float
    start_seconds: float
    peak_gb: float
    parts: dict[str, float]
    labeled_fraction: float
    cross_entropy_share: float
    rows_ms: float


def measure(case: Case, config: StepBenchConfig) -> Result:
    """A case's figures, from separate processes: no memory or compiled code of other cases."""
    with ProcessPoolExecutor(case.ranks, mp_context=get_context("spawn")) as pool:
        port = get_free_port()
        futures = [pool.submit(_run, case, config, rank, port) for rank in range(case.ranks)]
        results = [future.result() for future in futures]
    return results[0]


def _run(case: Case, config: StepBenchConfig, rank: int, port: int) -> Result:
    """One rank: a trainer on random documents."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": case.ranks, "LOCAL_WORLD_SIZE": case.ranks}
    os.environ.update({name: str(value) for name, value in ranks.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    model_config = case.model(ModelConfig.from_json(config.config_file))
    start = time.perf_counter()
    tokens = case.rows * case.seq_length
    train_config = training(
        case,
        steps=WARM_UPS + config.steps * max(1, min(4, TOKENS_OF_A_STEP // tokens)),
        compile=config.compile,
        activation_checkpointing=config.activation_checkpointing,
        cpu_threads=config.cpu_threads,
        cuda_graph="off",  # a graph has no parts
    )
    watch, steps = Stopwatch(), []
    with connect(train_config) as world:
        with watch.installed():
            trainer = random_trainer(train_config, model_config, world)
            with Prefetcher(trainer.loader.load, 0, train_config.max_steps) as rows:
                for step in range(train_config.max_steps):
                    steps.append(watch.step(lambda step=step: trainer.train_step(rows.get(step))))
                    if step == 0:
                        start_seconds = time.perf_counter() - start
        labeled = statistics.mean(labeled_fraction(trainer, step) for step in range(train_config.max_steps))
        peak = peak_memory(world.device)
        world.all_gather(None)  # a barrier: all ranks measure torch.mm at once
        quick = config.rates == 0
        rate = max(measure_matmul_flops(world.device, torch.bfloat16, quick=quick) for _ in range(max(1, config.rates)))
        rate = sum(world.all_gather(rate))
    measured = sorted(steps[WARM_UPS:], key=lambda timed: timed[0])
    seconds, parts = measured[len(measured) // 2]
    return Result(
        case=case,
        milliseconds=1e3 * seconds,
        tokens_per_second=tokens / seconds,
        mfu=tokens * training_flops(model_config, case.seq_length, labeled) / seconds / rate,
        product_gflops=rate / 1e9,
        start_seconds=start_seconds,
        peak_gb=peak / 1e9,
        parts={part: 1e3 * spent for part, spent in parts.items()},
        labeled_fraction=labeled,
        cross_entropy_share=cross_entropy_share(model_config, case.seq_length, labeled),
        rows_ms=1e3 * statistics.mean(watch.rows),
    )


def training(case: Case, *, steps: int, **settings: Any) -> TrainConfig:
    """Settings of a run of this case in bf16, without micro-batches; `settings` are added."""
    return TrainConfig(
        (Path("none"),),
        *(Path("none"),) * 3,
        hybrid_numerator=_MASKED_QUARTERS[case.objective],
        hybrid_denominator=4,
        seq_length=case.seq_length,
        local_batch_size=case.rows // case.ranks,
        global_batch_size=case.rows,
        batch_reduction=1,
        max_steps=steps,
        mixed_precision=True,
        **settings,
    )


def random_trainer(config: TrainConfig, model_config: ModelConfig, world: World) -> Trainer:
    """A trainer on random documents; compiled if the case says so and that saves anything, however short the run is."""
    store = random_store(model_config.vocab_size)
    inputs = Inputs(model_config, model_config.vocab_size, (store,), store)
    plan = HybridPlan(config, world.world_size)
    prepare_kernels(config, world)
    is_compiled = config.compile and compile_choice.seconds_saved(config, model_config, plan, world) > 0
    prepare_cpp_kernels(config, world, is_compiled=is_compiled)
    return Trainer(config, inputs, plan, world, is_compiled=is_compiled)


def cross_entropy_share(config: ModelConfig, length: int, labeled: float) -> float:
    """Fraction of the needed FLOPs in products with the output matrix, 2DV per labeled token."""
    return labeled * 2 * config.hidden_size * config.vocab_size / forward_flops(config, length, labeled)


def labeled_fraction(trainer: Trainer, step: int) -> float:
    """Fraction of labeled positions."""
    labels = trainer.loader.batch(trainer.loader.load(step), step).labels
    return (labels != IGNORE_INDEX).double().mean().item()


def random_store(vocab_size: int) -> TokenStore:
    """Documents of 1 … 600 non-special tokens."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 600, size=TOKENS // 300)
    tokens = generator.integers(16, vocab_size, size=lengths.sum()).astype(np.uint16)
    return TokenStore([tokens], [np.cumsum([0, *lengths])], vocab_size, None)


def run(config: StepBenchConfig) -> None:
    """Measure the cases sequentially; print each when done, or all at the end.

    Raises:
        InputError: the model or the case does not exist.
    """
    model_config = ModelConfig.from_json(config.config_file)
    cases = matching(config.match, [case for case in CASES if case.ranks <= machine.processes()])
    if not cases:
        names = ", ".join(case.name for case in CASES)
        raise InputError(f'--match "{config.match}": none of the cases that this machine can run ({names})')
    load, results = machine.load(), []
    for case in cases:
        results.append(measure(case, config))
        if not config.json:
            show(results[-1], with_header=len(results) == 1)
    report = {
        "hardware": machine.hardware(),
        "cores": usable_cores(),
        "load_before": load,
        "versions": machine.versions(),
        "config_file": str(config.config_file),
        "model": dataclasses.asdict(model_config),
        "copy_bytes_per_second": machine.copy_rate(),
        "results": [dataclasses.asdict(result) for result in results],
    }
    if config.save:
        machine.results_file(machine.STEPS).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if config.json:
        print(json.dumps(report))


def matching(text: str, cases: list[Case]) -> list[Case]:
    """The case of that name, or all whose name contains it."""
    return [case for case in cases if case.name == text] or [case for case in cases if text in case.name]


def show(result: Result, *, with_header: bool) -> None:
    """One row of the table."""
    columns = ["case", "ms/step", "tokens/s", "MFU", "mm GFLOPS", "start s", "peak GB", *PARTS, "(rows)", "CE FLOPs"]
    widths = [max(len(case.name) for case in CASES), *(max(len(column), LEAST_WIDTH) for column in columns[1:])]
    if with_header:
        print(table_row(columns, widths))
    row = [
        result.case.name, f"{result.milliseconds:.0f}", f"{result.tokens_per_second:.0f}", f"{result.mfu:.3f}",
        f"{result.product_gflops:.0f}", f"{result.start_seconds:.1f}", f"{result.peak_gb:.2f}",
        *(f"{result.parts[part]:.0f}" for part in PARTS), f"{result.rows_ms:.1f}",
        f"{result.cross_entropy_share:.3f}",
    ]  # fmt: skip
    print(table_row(row, widths), flush=True)


def main() -> None:
    """Entry point."""
    run_command(StepBenchConfig, run)


if __name__ == "__main__":
    main()
