"""A training step, part by part, beside what the machine can do: `python -m benchmarks.bench_train_step [--json]`.

Everything that a step of the trainer does is in it: packing rows, masking, forward, backward, clipping, LAMB and the
moving average, for one process. Model FLOP utilisation (MFU) is the FLOPs of the needed matrix products
(`gptbert.flops`) over the time, over the best rate of torch.mm measured in the same run.
"""

import functools
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import tyro

from benchmarks import machine
from gptbert import trainer as trainer_module
from gptbert.config import ModelConfig, TrainConfig
from gptbert.distributed import connect
from gptbert.flops import product_rate, training_flops
from gptbert.inputs import Inputs
from gptbert.memory import peak_memory
from gptbert.model import IGNORE_INDEX
from gptbert.objectives import HybridPlan
from gptbert.token_store import TokenStore
from gptbert.trainer import Trainer

WARM_UPS = 2
PARTS = ("rows", "masking", "forward", "backward", "optimizer", "rest")
TOKENS = 2_000_000


@dataclass(frozen=True)
class Case:
    """What a step trains."""

    objective: str
    seq_length: int
    rows: int

    @property
    def name(self) -> str:
        """Objective, T and B."""
        return f"{self.objective} T={self.seq_length} B={self.rows}"


CASES = (Case("MLM", 128, 32), Case("CLM", 128, 32), Case("MLM", 512, 8), Case("CLM", 512, 8))


@dataclass(frozen=True, kw_only=True)
class StepBenchConfig:
    """Measure training steps of one process, part by part."""

    config_file: Path = Path("configs/small.json")
    """Model."""
    steps: int = 6
    """Steps measured of each case, after two that are not."""
    compile: bool = True
    """Compile the model's blocks."""
    cpu_threads: int = 0
    """Threads on a CPU; 0: all cores."""
    match: str = ""
    """Only cases whose name contains this, such as "MLM T=128"."""
    json: bool = False
    """Print one JSON object instead of a table."""


@dataclass(frozen=True)
class Result:
    """Figures of a case.

    Attributes:
        case: its name.
        milliseconds: median of a step.
        tokens_per_second: at that.
        mfu: needed FLOPs over time over `product_rate`.
        product_gflops: the best rate of torch.mm, right after the steps.
        start_seconds: until the first step is done: model, compilation, warm-up.
        peak_gb: most memory of this process up to then, in 10^9 bytes (on a GPU: of its memory).
        parts: milliseconds of each of PARTS in the median step; they add up to it.
    """

    case: str
    milliseconds: float
    tokens_per_second: float
    mfu: float
    product_gflops: float
    start_seconds: float
    peak_gb: float
    parts: dict[str, float]


class Stopwatch:
    """Seconds that functions of the trainer take, by the part that they belong to."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def watch(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            machine.synchronize()
            start = time.perf_counter()
            result = function(*args, **kwargs)
            machine.synchronize()
            self.seconds[part] += time.perf_counter() - start
            return result

        return timed

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, the parts of every step are timed."""
        targets = [
            ("rows", Trainer, "load_rows"),
            ("masking", Trainer, "_batches"),
            ("forward", Trainer, "_forward"),
            ("backward", torch.Tensor, "backward"),
            ("optimizer", trainer_module, "update_weights"),
        ]
        patches = [patch.object(owner, name, self.watch(part, getattr(owner, name))) for part, owner, name in targets]
        for one in patches:
            one.start()
        yield
        for one in patches:
            one.stop()


def measure(case: Case, config: StepBenchConfig) -> Result:
    """Run a trainer on random documents."""
    model_config = ModelConfig.from_json(config.config_file)
    start = time.perf_counter()
    train_config = TrainConfig(
        *(Path("none"),) * 4,
        hybrid_numerator=int(case.objective == "MLM"),
        hybrid_denominator=1,
        seq_length=case.seq_length,
        local_batch_size=case.rows,
        global_batch_size=case.rows,
        batch_reduction=1,
        max_steps=WARM_UPS + config.steps,
        mixed_precision=True,
        compile=config.compile,
        cpu_threads=config.cpu_threads,
    )
    store = random_store(model_config.vocab_size)
    with connect(train_config) as world:
        inputs = Inputs(model_config, model_config.vocab_size, store, store)
        with patch.dict(trainer_module.COMPILE_FROM_FLOPS, cpu=0, cuda=0):
            trainer = Trainer(train_config, inputs, HybridPlan(train_config, 1), world)
        steps, watch = [], Stopwatch()
        with watch.installed():
            for step in range(train_config.max_steps):
                watch.seconds.clear()
                seconds = machine.seconds(lambda: trainer.train_step(trainer.load_rows(trainer.step)))
                steps.append((seconds, {**watch.seconds}))
                trainer.step += 1
                if step == 0:
                    start_seconds = time.perf_counter() - start
        labelled = statistics.mean(labelled_share(trainer, step) for step in range(train_config.max_steps))
        peak, rate = peak_memory(world.device), product_rate(world.device, torch.bfloat16)
    seconds, parts = sorted(steps[WARM_UPS:], key=lambda timed: timed[0])[config.steps // 2]
    parts["rest"] = seconds - sum(parts.values())
    tokens = case.rows * case.seq_length
    return Result(
        case=case.name,
        milliseconds=1e3 * seconds,
        tokens_per_second=tokens / seconds,
        mfu=tokens * training_flops(model_config, case.seq_length, labelled) / seconds / rate,
        product_gflops=rate / 1e9,
        start_seconds=start_seconds,
        peak_gb=peak / 1e9,
        parts={part: 1e3 * parts[part] for part in PARTS},
    )


def labelled_share(trainer: Trainer, step: int) -> float:
    """Share of the positions that carry a label."""
    (batch,) = trainer._batches(trainer.load_rows(step))  # noqa: SLF001
    return (batch.labels != IGNORE_INDEX).double().mean().item()


def random_store(vocab_size: int) -> TokenStore:
    """Documents of 1 … 600 ordinary tokens."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 600, size=TOKENS // 300)
    tokens = generator.integers(16, vocab_size, size=lengths.sum()).astype(np.uint16)
    return TokenStore([tokens], np.cumsum(lengths) - lengths, lengths, vocab_size, None)


def main() -> None:
    """Entry point; cases run one after another, each after the memory of the one before is free."""
    config = tyro.cli(StepBenchConfig, use_underscores=True)
    results = []
    for case in CASES:
        if config.match in case.name:
            results.append(measure(case, config))
            if not config.json:
                show(results[-1], with_header=len(results) == 1)
    if config.json:
        hardware = {"hardware": machine.hardware(), "cores": machine.cores(), "load": machine.load()}
        print(
            json.dumps({**hardware, "versions": machine.versions(), "results": [asdict(result) for result in results]})
        )


def show(result: Result, *, with_header: bool) -> None:
    """A line of the table."""
    columns = ["ms/step", "tokens/s", "MFU", "mm GFLOPS", "start s", "peak GB", *PARTS]
    if with_header:
        print(f"{'case':16} " + " ".join(f"{column:>9}" for column in columns))
    values = [
        f"{result.milliseconds:.0f}", f"{result.tokens_per_second:.0f}", f"{result.mfu:.3f}",
        f"{result.product_gflops:.0f}", f"{result.start_seconds:.1f}", f"{result.peak_gb:.2f}",
        *(f"{result.parts[part]:.0f}" for part in PARTS),
    ]  # fmt: skip
    print(f"{result.case:16} " + " ".join(f"{value:>9}" for value in values), flush=True)


if __name__ == "__main__":
    main()
