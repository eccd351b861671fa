"""A run's screen output."""

import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from gptbert.checkpoint.word_checkpoints import WordCheckpoints
from gptbert.config import TrainConfig
from gptbert.data.hybrid_plan import HybridPlan
from gptbert.data.inputs import Inputs
from gptbert.distributed.world import World
from gptbert.io.screen import log
from gptbert.model.objective import Objective
from gptbert.monitoring import recipes
from gptbert.schedules import MOST_INITIAL, initial_share
from kernels.assembler import use_right_assembler
from kernels.wanted import FUSED, VARIANTS, is_wanted, variant


def print_header(
    config: TrainConfig, inputs: Inputs, plan: HybridPlan, world: World, backend: str, words: WordCheckpoints
) -> None:
    """Log what a run is about to do: processes, kernels, data, model, vocabulary if it is unusual, and any warning."""
    model = inputs.model_config
    log(
        f"{config.name}: {world.world_size} x {world.device.type}, {backend} kernels, hybrid mode {plan.mode}, "
        f"{inputs.num_train_tokens:,} training tokens, {model.num_hidden_layers} layers of {model.hidden_size}, "
        f"run folder {config.run_dir}"
    )
    if inputs.remark:
        log(inputs.remark)
    if backend == "triton":
        log(_ways(config, world))
    if config.checkpoint_words:
        log(words.forecast())
    if warning := recipes.warning(config):
        log(warning)
    if (share := initial_share(config.ema_decay, config.max_steps)) > MOST_INITIAL:
        log(
            f"warning: after --max_steps {config.max_steps} the moving average of the weights (validation_ema, and the "
            f"default of the commands after training) still has {share:.0%} of the initial ones; --ema_decay "
            f"{0.01 ** (1 / config.max_steps):.2g} instead of {config.ema_decay:g} leaves 1 %"
        )


def _ways(config: TrainConfig, world: World) -> str:
    """What a run with Triton kernels does with them, for a bug report."""
    fused = [f"{op} ({variant(op)})" if op in VARIANTS else op for op in FUSED if is_wanted(op)]
    ways = [f"fused: {', '.join(fused) or 'nothing'}"]
    if world.device.type == "cuda":
        release = use_right_assembler()
        ways += [f"assembled by ptxas {release}"] if release else []
    ways.append("steps " + ("recorded in CUDA graphs" if config.records_steps(world.device.type) else "not recorded"))
    return "; ".join(ways)


def progress_bar(config: TrainConfig, world: World, first_step: int) -> tqdm:
    """A progress bar over the run's steps, on the main rank only."""
    interval = 0.5 if sys.stderr.isatty() else 10.0  # fewer lines in a log file than on a terminal
    return tqdm(
        total=config.max_steps,
        initial=first_step,
        unit="step",
        disable=not world.is_main,
        mininterval=interval,
        maxinterval=interval,
        ncols=shutil.get_terminal_size(fallback=(100, 24)).columns,  # some terminals report 0, which tqdm would accept
    )


@contextmanager
def validation_progress(bar: tqdm, total: int, what: str = "validating") -> Iterator[Callable[[int], None]]:
    """Context manager: shows how far a validation is, behind the bar of the steps, which stands still meanwhile.

    Args:
        bar: from `progress_bar`.
        total: rows to evaluate.
        what: is being done.

    Yields:
        A function to call with the number of rows just finished.
    """
    done, shown = 0, -math.inf if sys.stderr.isatty() else time.monotonic()

    def advance(rows: int) -> None:
        nonlocal done, shown
        done += rows
        if not bar.disable and time.monotonic() - shown >= bar.mininterval:
            bar.set_postfix_str(f"{what} {done / max(1, total):.0%}")
            shown = time.monotonic()

    before = None if bar.disable else bar.postfix
    yield advance
    bar.set_postfix_str(before or "", refresh=False)


def summary(record: dict[str, float], prefix: str) -> str:
    """A record's losses, and its tokens per second if present; `prefix` is "train" or "validation"."""
    parts = [
        f"{objective.value} {record[f'{prefix}/{objective.value}/loss']:.3f}"
        for objective in Objective
        if f"{prefix}/{objective.value}/loss" in record
    ]
    if f"{prefix}/tokens_per_second" in record:
        parts.append(f"{record[f'{prefix}/tokens_per_second']:,.0f} tokens/s")
    return ", ".join(parts)
