"""Decides whether to compile a run: the estimated time saved by faster steps against the cost of compiling.

The estimate is a function of settings and constants, without measurements: a restarted run must decide as before,
since compiled steps round differently.
"""

from dataclasses import dataclass
from functools import partial

from gptbert.checkpoint.checkpoint import Checkpoint
from gptbert.config import ModelConfig, TrainConfig
from gptbert.data.hybrid_plan import HybridPlan
from gptbert.data.micro_batch import micro_batch_rows
from gptbert.distributed.world import World
from gptbert.monitoring.flops import training_flops
from gptbert.training.kernel_check import kernel_settings
from kernels.attention_context.fused import is_fused as is_attention_fused

# Per row length of a run, each compiled separately; ten seconds if Inductor has it in its disk cache.
COMPILE_SECONDS = {"cpu": 30.0, "cuda": 30.0}

# On a CPU, per token, layer and dimension of the hidden states: compiling spares work between matrix products.
# Measured, on one core or two: 0.4 µs with D 256 and 6 layers (22.6 s a step, compiled 7.6), 0.17 with small.json on
# two cores (830 tokens/s, compiled 2,500), 0.3 with tiny.json in fp32 on a busy machine (1,350 tokens/s a process,
# compiled 2,350).
_CPU_SECONDS_SAVED = 2.5e-7

# On a GPU where not all is fused, a step is bound by the host or the device. A compiled one of 12 layers has some 2,500
# launches per micro-batch, of 10 to 46 µs each on the hosts measured; in a CUDA graph, launched by the device itself,
# 8 µs each with the kernels' own time where batches are small. Without compiling, twice as many launches and 1.5 times
# the device time are assumed; neither was measured.
_LAUNCHES_SAVED_PER_LAYER = 200
_SECONDS_PER_LAUNCH = 15e-6
_SECONDS_PER_RECORDED_LAUNCH = 5e-6
_GPU_FLOPS_PER_SECOND = 1e14
_GPU_SHARE_SAVED = 0.5

_FORMER_FLOPS = {
    "cpu": 1e15,
    "cuda": 1e17,
}  # thresholds of earlier versions, whose checkpoints do not record the choice


@dataclass(frozen=True)
class CompileChoice:
    """Whether a run is compiled, and the reason, as the end of a sentence."""

    is_compiled: bool
    reason: str

    def __str__(self) -> str:
        return f"{'compiled' if self.is_compiled else 'not compiled'}: {self.reason}"


def choose(
    config: TrainConfig,
    model_config: ModelConfig,
    plan: HybridPlan,
    world: World,
    resumed: Checkpoint | None = None,
    resumed_compile: bool = True,
) -> CompileChoice:
    """Decide; the same on every rank, since the settings are.

    Args:
        config: the run's settings; `--no_compile` decides.
        model_config: the model's shape.
        plan: the run's plan.
        world: its processes.
        resumed: the checkpoint that the run resumes from. Its choice is kept, even if the run's length has changed.
        resumed_compile: the checkpoint's `compile`; if the command line's differs, its choice is not kept.
    """
    if not config.compile:
        return CompileChoice(False, "--no_compile")
    device = world.device.type
    if device == "mps":
        return CompileChoice(False, "compiled code has not been tried on Apple's MPS")
    flops = _flops(model_config, config, plan, world.world_size)
    if resumed is not None and resumed_compile:
        was_compiled = resumed.is_compiled
        if was_compiled is None:
            was_compiled = flops >= _FORMER_FLOPS[device]
        return CompileChoice(was_compiled, "as the run was that this one goes on from")
    saved = seconds_saved(config, model_config, plan, world)
    cost = COMPILE_SECONDS[device] * len(plan.length_factors)
    saves = f"saves {'some ' if saved >= 1 else ''}{_in_words(saved)} of the run"
    gain = f"{saves} and takes {_in_words(cost)}, or a third of it where that is cached"
    reason = f"compiling {gain} (--no_compile: never)" if saved else "fused kernels leave nothing to compile"
    return CompileChoice(saved >= cost, reason)


def seconds_saved(config: TrainConfig, model_config: ModelConfig, plan: HybridPlan, world: World) -> float:
    """Estimated seconds that compiling saves over a whole run, from its first step; 0 where `is_fused`."""
    if world.device.type == "cpu":
        tokens = plan.tokens_before(config.max_steps) / world.world_size
        return _CPU_SECONDS_SAVED * tokens * model_config.num_hidden_layers * model_config.hidden_size
    if is_fused(config, model_config, plan, world):
        return 0.0
    flops = _flops(model_config, config, plan, world.world_size)
    rows = plan.tokens_before(config.max_steps) / config.seq_length / world.world_size
    most_rows = micro_batch_rows(config, config.seq_length, world.device)
    micro_batches = max(config.max_steps, rows / most_rows)
    per_launch = _SECONDS_PER_RECORDED_LAUNCH if config.records_steps("cuda") else _SECONDS_PER_LAUNCH
    launches = micro_batches * model_config.num_hidden_layers * _LAUNCHES_SAVED_PER_LAYER
    return max(launches * per_launch, _GPU_SHARE_SAVED * flops / _GPU_FLOPS_PER_SECOND)


def is_fused(config: TrainConfig, model_config: ModelConfig, plan: HybridPlan, world: World) -> bool:
    """Whether fused kernels do all of a block that is between matrix products, at every row length.

    Compiled blocks then launch what the others launch: the graphs of a step of base_32k have the same 602 nodes.
    """
    run = kernel_settings(config, model_config, plan, world)
    if run.attention is None or run.gates is None or run.mixes is None:
        return False
    fits = partial(is_attention_fused, world.device, run.logits_type)
    _, head_size, num_position_vectors = run.attention
    return all(run.gates) and all(fits(length, head_size, num_position_vectors) for length in plan.row_lengths)


def _flops(model_config: ModelConfig, config: TrainConfig, plan: HybridPlan, world_size: int) -> float:
    """FLOPs of one process in the whole run, as if every token carried a label."""
    tokens = plan.tokens_before(config.max_steps) / world_size
    return tokens * training_flops(model_config, config.seq_length, labeled_fraction=1.0)


def _in_words(seconds: float) -> str:
    for size, unit in ((3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds" if seconds >= 1 else "less than a second"
