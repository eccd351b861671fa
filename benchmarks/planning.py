"""Planning for a simulated corpus and cluster: memory of each rank, and time per step.

`python -m benchmarks.planning` makes a token store of 10^12 tokens from one real shard, hard-linked under 20,000 names,
opens it as a run does, and gets the rows of some of 1,024 ranks from the hybrid plan and the row streams: at the start,
where rows grow, across the ends of a block and of the epoch, and at the end. Each rank is a separate process, one at a
time. Not realistic: all shards have the same bytes, so reads come from memory.
"""

import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from benchmarks import machine
from benchmarks.markdown import markdown
from gptbert.command_line import run_command
from gptbert.config import TrainConfig
from gptbert.data.hybrid_plan import HybridPlan
from gptbert.data.packing import RowStream
from gptbert.data.token_store import SHARD_TOKENS, TokenStore, TokenStoreWriter
from gptbert.distributed.hardware import usable_cores
from gptbert.model.objective import Objective

T = TypeVar("T")

MEAN_LENGTH = 500  # tokens per document
VOCAB_SIZE = 32768


@dataclass(frozen=True, kw_only=True)
class PlanningConfig:
    """Simulate the planning of a large run, and measure its memory and time."""

    tokens: int = 10**12
    """Tokens of the corpus."""
    world_size: int = 1024
    """Ranks of the run."""
    ranks: tuple[int, ...] = (0, 256, 1023)
    """Simulated ranks; with the usual 1/4 masked, the first quarter of all ranks trains MLM."""
    max_steps: int = 600_000
    """Steps of the run."""
    global_batch_size: int = 8192
    """Rows per step at the end, of 512 tokens; a quarter of it at the start."""
    steps: int = 100
    """Steps measured per phase."""
    pause: float = 1.0
    """Seconds to wait after a phase's first step while the next block is drawn; a training step takes as long."""


@dataclass
class Figures:
    """Results of one rank.

    Attributes:
        seconds: by name: opening the files, the plan, the streams.
        anonymous: bytes of private memory beyond those of a process after all imports, by name.
        mapped: resident bytes of mapped files at the end; they belong to the page cache, which is shared.
        page_tables: bytes of the process's page tables at the end.
        steps: milliseconds of each step, by phase.
        first: milliseconds of a phase's first step, which draws a block: the cost of resuming there.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    anonymous: dict[str, int] = field(default_factory=dict)
    mapped: int = 0
    page_tables: int = 0
    steps: dict[str, list[float]] = field(default_factory=dict)
    first: dict[str, float] = field(default_factory=dict)


def write_store(folder: Path, tokens: int) -> Path:
    """A store of about `tokens` tokens: one shard under many names.

    Args:
        folder: on a single file system, with room for one shard.
        tokens: size of the store; whole shards of `SHARD_TOKENS`, or one smaller shard.
    """
    shard_tokens = min(tokens, SHARD_TOKENS)
    generator = np.random.default_rng(0)
    lengths = generator.geometric(1 / MEAN_LENGTH, size=shard_tokens // MEAN_LENGTH)
    ids = generator.integers(16, VOCAB_SIZE, size=lengths.sum(), dtype=np.uint16)
    with TokenStoreWriter(folder / "shard.safetensors", VOCAB_SIZE, "simulated", 2 * len(ids)) as writer:
        writer.append(ids, lengths)
    count = max(1, tokens // shard_tokens)
    for number in range(1, count + 1):
        os.link(folder / "shard.safetensors", folder / f"corpus-{number:05d}-of-{count:05d}.safetensors")
    return folder / "corpus.safetensors"


def run_config(config: PlanningConfig) -> TrainConfig:
    """The simulated run."""
    none = Path("none")
    return TrainConfig(
        (none,), none, none, none, seq_length=512, seq_length_growth=True, local_batch_size=8,
        global_batch_size=config.global_batch_size, max_steps=config.max_steps,
    )  # fmt: skip


def memory(name: str) -> int:
    """Bytes of a field of /proc/self/status, such as RssAnon."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


class Rank:
    """One rank of the run, up to its rows."""

    def __init__(self, config: PlanningConfig, path: Path, rank: int) -> None:
        self.config = config
        self.rank = rank
        self.figures = Figures()
        self._base = memory("RssAnon")
        run = run_config(config)
        self.store = self._timed("open the files", lambda: TokenStore.open(path))
        self.plan = self._timed("plan", lambda: HybridPlan(run, config.world_size))
        self.streams = self._timed(
            "streams",
            lambda: {
                objective: RowStream(self.store, run.seq_length, (run.seed, index))
                for index, objective in enumerate(Objective)
            },
        )

    def _timed(self, name: str, action: Callable[[], T]) -> T:
        start = time.perf_counter()
        result = action()
        self.figures.seconds[name] = time.perf_counter() - start
        self.figures.anonymous[name] = memory("RssAnon") - self._base
        return result

    def step(self, step: int) -> float:
        """Seconds to build the rows of a step."""
        start = time.perf_counter()
        for share in self.plan.shares(step, self.rank):
            self.streams[share.objective].rows(share.first_slot, share.num_rows, share.length_factor)
        return time.perf_counter() - start

    def phase(self, name: str, steps: Iterable[int]) -> None:
        """Measure consecutive steps; after the first, the next block is drawn in the background, as in a real run."""
        steps = list(steps)
        self.figures.first[name] = 1e3 * self.step(steps[0])
        time.sleep(self.config.pause)
        self.figures.steps[name] = [1e3 * self.step(step) for step in steps[1:]]
        self.figures.anonymous[name] = memory("RssAnon") - self._base
        self.figures.mapped, self.figures.page_tables = memory("RssFile"), memory("VmPTE")

    def measure(self) -> Figures:
        """All phases of the run."""
        last, count = self.config.max_steps, self.config.steps
        self.phase("first steps", range(count))
        for share in (0.7, 0.9):
            border = int(share * last)
            self.phase(f"rows grow at {share:.0%}", range(border - count // 2, border + count // 2))
        for name, position in self._borders():
            border = self._step_at(position)
            self.phase(name, range(max(0, border - count // 2), min(last, border + count // 2)))
        self.phase("last steps", range(last - count, last))
        return self.figures

    def _borders(self) -> list[tuple[str, int]]:
        """Slots at the ends of the first block and the first epoch of the rank's objective."""
        (share, *_) = self.plan.shares(0, self.rank)
        stream = self.streams[share.objective]
        stream.rows(0, 1)
        first_block_end = int(stream.document_order.block_starts(0)[1])
        borders = [("over the end of a block", first_block_end // stream.seq_length)]
        if self._slots_before(self.config.max_steps - 1) > stream.slots_per_epoch:
            borders.append(("over the end of the epoch", stream.slots_per_epoch))
        return borders

    def _slots_before(self, step: int) -> int:
        (share, *_) = self.plan.shares(step, self.rank)
        return share.first_slot

    def _step_at(self, slot: int) -> int:
        """The first step whose rows start at or after a slot."""
        low, high = 0, self.config.max_steps - 1
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self._slots_before(middle) < slot else (low, middle)
        return low


def measure_rank(config: PlanningConfig, path: Path, rank: int, results: multiprocessing.Queue) -> None:
    """Measure a rank in a separate process."""
    results.put(Rank(config, path, rank).measure())


def simulate(config: PlanningConfig, folder: Path) -> dict[int, Figures]:
    """Figures of each of the config's ranks.

    Args:
        config: what to simulate.
        folder: of the store.
    """
    path = write_store(folder, config.tokens)
    figures, context = {}, multiprocessing.get_context("spawn")
    for rank in config.ranks:
        results = context.Queue()
        process = context.Process(target=measure_rank, args=(config, path, rank, results))
        process.start()
        figures[rank] = results.get()
        process.join()
    return figures


def tables(figures: dict[int, Figures]) -> str:
    """Markdown: memory and start-up time of ranks; then the steps of each phase."""
    seconds = next(iter(figures.values())).seconds
    starts = [["rank", *seconds, "private memory then", "most of it", "page tables", "mapped files"]]
    phases = [["rank", "phase", "median ms", "slowest ms", "resuming there ms"]]
    for rank, of in figures.items():
        held = (of.anonymous["streams"], max(of.anonymous.values()), of.page_tables, of.mapped)
        cells = [f"{value:.2f} s" for value in of.seconds.values()] + [f"{value / 1e6:,.0f} MB" for value in held]
        starts.append([f"{rank}", *cells])
        for phase, steps in of.steps.items():
            middle, slowest = statistics.median(steps), max(steps)
            phases.append([f"{rank}", phase, f"{middle:.2f}", f"{slowest:.2f}", f"{of.first[phase]:.0f}"])
    return "\n".join([*markdown(starts, text_columns=()), "", *markdown(phases, text_columns=(1,))])


def run(config: PlanningConfig) -> None:
    """Simulate and print."""
    with tempfile.TemporaryDirectory(prefix="planning-") as folder:
        figures = simulate(config, Path(folder))
    print(f"{machine.hardware()}, {usable_cores()} cores, load {machine.load():.1f}\n")
    print(tables(figures))


if __name__ == "__main__":
    run_command(PlanningConfig, run)
