"""`torchrun -m gptbert.train …`: open inputs, find a checkpoint, prepare kernels, start the trainer.

In Python, `gptbert.train(config)` is the function `train` here.
"""

import dataclasses
import sys
from contextlib import ExitStack, redirect_stderr
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from gptbert import schedules
from gptbert.checkpoint import manifest
from gptbert.checkpoint.branch import settings_of_branch
from gptbert.checkpoint.checkpoint import Checkpoint
from gptbert.checkpoint.folder import list_checkpoints, read_settings
from gptbert.checkpoint.initial_weights import digest_of_weights, read_initial_weights
from gptbert.checkpoint.kept import check_best
from gptbert.checkpoint.resume import changed_schedules, changed_settings, find_for_all_ranks, progress_state
from gptbert.checkpoint.word_checkpoints import WordCheckpoints
from gptbert.command_line import make_callable, run_command
from gptbert.config import TrainConfig
from gptbert.data.hybrid_plan import HybridPlan
from gptbert.data.inputs import Inputs
from gptbert.data.mask_history import check_counts
from gptbert.data.progress import Progress
from gptbert.distributed.agreement import check_same
from gptbert.distributed.fsdp import shard_size
from gptbert.distributed.world import World, connect
from gptbert.errors import InputError
from gptbert.io.names import METRICS
from gptbert.io.screen import Lasting, log
from gptbert.model.compilation import restored_settings
from gptbert.monitoring import figures
from gptbert.monitoring.display import print_header
from gptbert.monitoring.hooks import CheckpointHook, Hooks, RecordHook
from gptbert.monitoring.records import has_record, records_of
from gptbert.scoring.pair_scores import PairScores
from gptbert.trainer import Trainer
from gptbert.training import compile_choice
from gptbert.training.kernel_check import agree_on_fused, kernel_check, kernel_settings
from gptbert.training.preparation import (
    log_choices,
    own_run_dir,
    prepare_cpp_kernels,
    prepare_kernels,
    prepare_run_dir,
    with_fast_precision,
)

# what is said where processes differ
_OTHER_COMMAND = "the processes were given different flags or hooks; every host must start the same command"
_OTHER_KERNELS = (
    "the processes have chosen different kernels; name them with --kernels, or give every host the same packages and "
    "the same KERNELS_BACKEND"
)
_OTHER_CONTENT = "its content differs between hosts; each needs the same file"


@dataclass(frozen=True)
class TrainResult:
    """What a run came to; the same on every process.

    Attributes:
        run_dir: the run's folder.
        step: steps that it was trained for, including those before it was resumed.
        checkpoint: the newest checkpoint's folder; None if there is none.
        training: the last record of training steps (docs/metrics.md); None if there is none.
        validation: the last validation's record; None if there is none.
    """

    run_dir: Path
    step: int
    checkpoint: Path | None
    training: dict[str, float] | None
    validation: dict[str, float] | None

    @classmethod
    def of(cls, run_dir: Path, step: int) -> "TrainResult":
        """From the run's files."""
        last: dict[str, dict[str, float]] = {}
        for record in records_of(run_dir / METRICS):
            last |= dict.fromkeys((name.partition("/")[0] for name in record), record)
        newest = list_checkpoints(run_dir)[-1:]
        return cls(run_dir, step, newest[0] if newest else None, last.get("train"), last.get("validation"))


def train(
    config: TrainConfig,
    *,
    on_step: RecordHook | None = None,
    on_validation: RecordHook | None = None,
    on_checkpoint: CheckpointHook | None = None,
) -> TrainResult:
    """Train as `config` specifies, from scratch or from a checkpoint; under torchrun, every process calls it.

    Args:
        config: the settings, which are the command's flags.
        on_step: see `Hooks`.
        on_validation: see there.
        on_checkpoint: see there.

    Raises:
        InputError: invalid input, or a hook failed; on every rank, with the same message.
        LostProcessError: see `connect`.
        StoppedError: a signal requested a stop, and a checkpoint was saved; see `StopSignal`.
    """
    if config.run_file is not None:
        raise InputError("run_file: is read by the command line only (gptbert.command_line.parse)")
    hooks = Hooks(on_step, on_validation, on_checkpoint)
    with redirect_stderr(Lasting(sys.stderr)), restored_settings(), connect(config) as world, ExitStack() as ownership:
        # frees every reference to the process group before connect() destroys it
        step = _fit(config, world, ownership, hooks)
        return world.on_main(TrainResult.of, config.run_dir, step)


def fit(config: TrainConfig) -> None:
    """The command: `train` without hooks."""
    train(config)


def _fit(config: TrainConfig, world: World, ownership: ExitStack, hooks: Hooks) -> int:
    """Returns the number of steps at the end."""
    config = with_fast_precision(config, world)
    branch, branch_line = world.on_main(settings_of_branch, config)  # alone: a parent that goes on may save now
    with world.errors_on_all_ranks():
        config = dataclasses.replace(config, **branch)
        backend = prepare_kernels(config, world)
        inputs = Inputs.open(config)
        config = dataclasses.replace(config, n_special_tokens=len(inputs.special_ids))  # for the records
        plan = HybridPlan(config, world.world_size)
        pairs = _pairs(config, world)
    is_checked = backend == "triton" and config.kernel_check == "on"
    run = kernel_settings(config, inputs.model_config, plan, world) if is_checked else None
    with kernel_check(run, world.device, config.timeout) as finish_check:
        with world.errors_on_all_ranks():
            inputs.check_ids(world.rank, world.world_size)
            shard_size(config, world)  # raises InputError if invalid
        _check_same_start(config, hooks, backend, inputs, pairs, world)
        world.on_main(ownership.enter_context, own_run_dir(config))
        path, resumed = find_for_all_ranks(config, inputs.model_config, world)
        first_step = resumed.step if resumed else 0
        with world.errors_on_all_ranks():
            check_counts(resumed.mask_counts if resumed and config.mask_history else None, inputs.num_train_tokens)
            initial_weights = None if resumed else read_initial_weights(config, inputs.model_config)
        is_own = world.on_main(_is_own, config, path)
        pending = world.on_main(_missing_records, config, first_step) if is_own else []
        if not pending and world.on_main(_is_over, config, path, first_step):
            return first_step
        with world.errors_on_all_ranks():
            progress, note = _progress(config, inputs, plan, path, resumed)
            words = WordCheckpoints(config, progress)
        _check_same_contents(config, inputs, progress, path, initial_weights, world)
        with world.errors_on_all_ranks():
            reasons = finish_check()
        agree_on_fused(reasons, world)
    was_asked = path is None or read_settings(path).get("compile") is not False
    choice = compile_choice.choose(config, inputs.model_config, plan, world, resumed, was_asked)
    backend = prepare_cpp_kernels(config, world, is_compiled=choice.is_compiled)
    with world.errors_on_all_ranks():
        if world.is_main:
            prepare_run_dir(config, inputs.model_config, world, backend)
            print_header(config, inputs, plan, world, backend, words)
            log_choices(config, world, choice)
            _log_start(config, path, first_step, "\n".join(filter(None, [note, branch_line, *words.set_aside()])))
    trainer = Trainer(
        config,
        inputs,
        plan,
        world,
        initial_weights,
        is_compiled=choice.is_compiled,
        progress=progress,
        hooks=hooks,
        pairs=pairs,
    )
    if world.is_main:
        _log_data(config, inputs, trainer)
    if resumed:
        trainer.restore(resumed, is_own=is_own, pending=pending)
        del resumed  # as large as the run's own state
    trainer.run()
    return trainer.step


def _progress(
    config: TrainConfig, inputs: Inputs, plan: HybridPlan, path: Path | None, resumed: Checkpoint | None
) -> tuple[Progress, str]:
    """What the run goes on from, and a note on it for the log, or ""."""
    if resumed is None or path is None:
        return Progress(config, inputs, plan), ""
    state, note = progress_state(path, resumed, config, inputs)
    progress = Progress(config, inputs, plan, state, resumed.step)
    if config.mask_history and resumed.mask_counts is not None and not progress.has_same_corpora:
        raise InputError(
            "--mask_history: the checkpoint counts masks of other token files than --train_path, or of these in "
            "another order; name them as they were, or leave --mask_history out"
        )
    return progress, note or "\n".join(progress.changed_files)


def _pairs(config: TrainConfig, world: World) -> PairScores | None:
    """The run's minimal pairs, if it has any; raises InputError, also for a record of `--keep_best` that it lacks."""
    check_best(config)
    return PairScores(config, world) if config.pairs_path else None


def _check_same_start(
    config: TrainConfig, hooks: Hooks, backend: str, inputs: Inputs, pairs: PairScores | None, world: World
) -> None:
    """Refuse hosts with other commands, kernels, or small files; every rank must call it."""
    values = {
        _OTHER_COMMAND: (config, hooks.names),
        _OTHER_KERNELS: backend,
        f"--config_file {config.config_file}: {_OTHER_CONTENT}": inputs.model_config,
        f"--tokenizer_path {config.tokenizer_path}: {_OTHER_CONTENT}": inputs.tokenizer_hash,
        f"--pairs_path: {_OTHER_CONTENT}": pairs and pairs.digest,
    }
    check_same(values, world)


def _check_same_contents(
    config: TrainConfig,
    inputs: Inputs,
    progress: Progress,
    path: Path | None,
    weights: dict[str, Tensor] | None,
    world: World,
) -> None:
    """Refuse hosts whose token files or first weights have other contents; every rank must call it.

    Copies on each host's own disk may have other paths, behind links or in other working directories.
    """
    if world.world_size == 1:
        return
    corpora = zip(config.train_path, progress.digests, inputs.train_stores, strict=True)
    with world.errors_on_all_ranks():
        values = {
            **{f"--train_path {file}: {_OTHER_CONTENT}": (digest, store.num_words) for file, digest, store in corpora},
            f"--valid_path {config.valid_path}: {_OTHER_CONTENT}": progress.validated_on,
            f"--resume {path}: {_OTHER_CONTENT}": path and manifest.digest(path),
            f"--initial_weights {config.initial_weights}: {_OTHER_CONTENT}": weights and digest_of_weights(weights),
        }
    check_same(values, world)


def _is_own(config: TrainConfig, path: Path | None) -> bool:
    """Whether a checkpoint is in this run's folder."""
    return path is not None and any(map(path.samefile, list_checkpoints(config.run_dir)))


def _missing_records(config: TrainConfig, step: int) -> list[str]:
    """The records, "validation" and "pairs", that are due after `step` and missing; see `Trainer.restore`.

    A checkpoint is saved before the validation of its step, so a run may end between the two.
    """
    if step > config.max_steps:
        return []
    every = {"validation": config.validate_every} | ({"pairs": config.score_every} if config.pairs_path else {})
    due = [name for name in every if schedules.is_due(step, every[name], config.max_steps)]
    metrics = config.run_dir / METRICS
    return [name for name in due if not has_record(metrics, step, f"{name}/")]


def _is_over(config: TrainConfig, path: Path | None, step: int) -> bool:
    """Whether a run has no steps left; says so, or raises InputError if the checkpoint was asked for by name."""
    if step < config.max_steps:
        return False
    if config.resume != "auto":
        raise InputError(f"--resume {path}: its step {step} is the end of --max_steps {config.max_steps}")
    log(f"{config.name}: finished already, {path} is step {step} of {config.max_steps}")
    return True


def _log_data(config: TrainConfig, inputs: Inputs, trainer: Trainer) -> None:
    log(trainer.progress.describe_corpora(inputs, config.max_steps))
    for line in [*figures.of_rows(config, inputs, trainer.progress), *figures.of_validation(inputs)]:
        log(line)
    if trainer.validation.coverage:
        log(f"validating on {trainer.validation.coverage} (--validation_steps)")
    if trainer.pairs:
        log(str(trainer.pairs))


def _log_start(config: TrainConfig, path: Path | None, step: int, note: str) -> None:
    """Say what the run starts from: a checkpoint or other weights; nothing if it starts from random ones."""
    if path:
        changes = changed_settings(path, config)
        log(f"going on from {path}" + (f"; changed since: {', '.join(changes)}" if changes else ""))
        if jumps := changed_schedules(path, step, config):
            log(jumps)
    elif config.initial_weights:
        log(f"starting from the weights of {config.initial_weights}")
    if note:
        log(note)


def main() -> None:
    """Entry point."""
    run_command(TrainConfig, fit, under_torchrun=True)


make_callable(__name__, train)

if __name__ == "__main__":
    main()
