"""Whether a run is compiled: an estimate of what faster steps save, against what compiling takes.

The estimate is a function of settings and of constants. Nothing is measured for it: a run that is started again must
decide as before, since compiled steps round elsewhere.
"""

from dataclasses import dataclass

from gptbert.checkpoint.checkpoint import Checkpoint
from gptbert.config import ModelConfig, TrainConfig
from gptbert.data.hybrid_plan import HybridPlan
from gptbert.data.micro_batch import micro_batch_rows
from gptbert.distributed.world import World
from gptbert.monitoring.flops import training_flops

# For each row length of a run, which has code of its own; ten seconds where Inductor has it on the disk.
COMPILE_SECONDS = {"cpu": 30.0, "cuda": 30.0}

# On a CPU. A process of 700 steps of D 256, V 32,768 did its 4·10¹⁴ FLOPs in 45 minutes without compiling, and side by
# side its steps took 22.6 seconds so and 7.6 compiled, on one busy core. With several cores a process saves less.
_CPU_FLOPS_PER_SECOND = 1.5e11
_CPU_SHARE_SAVED = 0.6

# On a GPU, where the host or the device is what a step waits for. A compiled step of 12 layers has some 2,500 launches
# for one micro-batch, of 10 to 46 µs each on the hosts that were measured. How many more there are without compiling
# was not: that it is as many again is a guess, and so is half as much time of the device again.
_LAUNCHES_SAVED_PER_LAYER = 200
_SECONDS_PER_LAUNCH = 15e-6
_GPU_FLOPS_PER_SECOND = 1e14
_GPU_SHARE_SAVED = 0.5

_FORMER_FLOPS = {
    "cpu": 1e15,
    "cuda": 1e17,
}  # from which versions compiled whose checkpoints do not say whether they did


@dataclass(frozen=True)
class CompileChoice:
    """Whether a run is compiled, and why, as the end of a sentence."""

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
        plan: of the run.
        world: its processes.
        resumed: what the run goes on from. Its decision stays, however long the run is now.
        resumed_compile: the setting there; if the command line says something else now, that run does not decide.
    """
    if not config.compile:
        return CompileChoice(False, "--no_compile")
    device = world.device.type
    flops = _flops(model_config, config, plan, world.world_size)
    if resumed is not None and resumed_compile:
        was_compiled = resumed.is_compiled
        if was_compiled is None:
            was_compiled = flops >= _FORMER_FLOPS[device]
        return CompileChoice(was_compiled, "as the run was that this one goes on from")
    saved = seconds_saved(config, model_config, plan, world)
    cost = COMPILE_SECONDS[device] * len(plan.length_factors)
    gain = (
        f"saves some {_in_words(saved)} of the run and takes {_in_words(cost)}, or a third of it where that is cached"
    )
    return CompileChoice(saved >= cost, f"compiling {gain} (--no_compile: never)")


def seconds_saved(config: TrainConfig, model_config: ModelConfig, plan: HybridPlan, world: World) -> float:
    """What a whole run, from its first step on, takes less by the estimate if it is compiled."""
    flops = _flops(model_config, config, plan, world.world_size)
    if world.device.type == "cpu":
        return _CPU_SHARE_SAVED * flops / _CPU_FLOPS_PER_SECOND
    rows = plan.tokens_before(config.max_steps) / config.seq_length / world.world_size
    most_rows = micro_batch_rows(config, config.seq_length, world.device)
    micro_batches = max(config.max_steps, rows / most_rows)
    host = micro_batches * model_config.num_hidden_layers * _LAUNCHES_SAVED_PER_LAYER * _SECONDS_PER_LAUNCH
    return max(host, _GPU_SHARE_SAVED * flops / _GPU_FLOPS_PER_SECOND)


def _flops(model_config: ModelConfig, config: TrainConfig, plan: HybridPlan, world_size: int) -> float:
    """Of one process in the whole run, if every token carried a label."""
    tokens = plan.tokens_before(config.max_steps) / world_size
    return tokens * training_flops(model_config, config.seq_length, labeled_fraction=1.0)


def _in_words(seconds: float) -> str:
    for size, unit in ((3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds" if seconds >= 1 else "less than a second"
