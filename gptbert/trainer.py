"""The training loop: a single step, and the run around it."""

import dataclasses
from collections.abc import Callable, Collection
from contextlib import ExitStack, suppress

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from tqdm import tqdm

from gptbert import schedules
from gptbert.checkpoint import checkpoint
from gptbert.checkpoint.checkpoint import Checkpoint
from gptbert.checkpoint.kept import BestCheckpoint
from gptbert.checkpoint.word_checkpoints import WordCheckpoints
from gptbert.config import TrainConfig
from gptbert.data.hybrid_plan import HybridPlan
from gptbert.data.inputs import Inputs
from gptbert.data.loader import BatchLoader, LoadedShare
from gptbert.data.micro_batch import MicroBatches
from gptbert.data.prefetcher import Prefetcher
from gptbert.data.progress import Progress
from gptbert.distributed.fsdp import full_tensor, load_moments, load_weights, new_moments, shard
from gptbert.distributed.random_state import RandomState
from gptbert.distributed.stop_signal import StopRequested, StopSignal
from gptbert.distributed.world import World
from gptbert.errors import InputError, StoppedError
from gptbert.io.names import SAMPLES, VALIDATED
from gptbert.io.screen import log
from gptbert.model import GPTBert
from gptbert.model.batch import Batch
from gptbert.model.compilation import compile_blocks, compiling
from gptbert.model.objective import Objective
from gptbert.monitoring import figures
from gptbert.monitoring.display import progress_bar, summary, validation_progress
from gptbert.monitoring.hooks import Hooks
from gptbert.monitoring.metrics import Throughput
from gptbert.monitoring.records import forget_from
from gptbert.monitoring.samples import Samples
from gptbert.monitoring.trackers import Trackers
from gptbert.monitoring.training_record import TrainingRecord
from gptbert.monitoring.validation import Validation, ValidationSettings
from gptbert.optim import WeightAverage, build_optimizer
from gptbert.scoring.pair_scores import PairScores
from gptbert.training import compile_choice
from gptbert.training.preparation import check_run_dir
from gptbert.training.step import EagerStep, RecordedStep, autocast


class Trainer:
    """One rank's state of a run, and its training loop."""

    def __init__(
        self,
        config: TrainConfig,
        inputs: Inputs,
        plan: HybridPlan,
        world: World,
        initial_weights: dict[str, Tensor] | None = None,
        *,
        is_compiled: bool | None = None,
        progress: Progress | None = None,
        hooks: Hooks | None = None,
        pairs: PairScores | None = None,
    ) -> None:
        self.config = config
        self.hooks = hooks or Hooks()
        self.inputs = inputs
        self.progress = progress or Progress(config, inputs, plan)
        self.plan = self.progress.plan
        self.world = world
        torch.manual_seed(config.seed)  # the same weights on every rank
        self.model = GPTBert(inputs.model_config)
        if initial_weights:
            self.model.load_state_dict(initial_weights)
        is_sharded = config.is_sharded(world.world_size)
        if not is_sharded:  # otherwise `shard` moves it block by block
            self.model.to(world.device)
            # CPUs of different kinds draw numbers that differ in their last bits; before the average copies them
            world.broadcast([*self.model.parameters(), *self.model.buffers()])
        for block in self.model.blocks:
            block.is_checkpointed = config.activation_checkpointing
        self.ema = WeightAverage(self.model, config.ema_decay)
        if is_compiled is None:
            is_compiled = compile_choice.choose(config, inputs.model_config, plan, world).is_compiled
        self.is_compiled = is_compiled
        if self.is_compiled:
            with compiling():
                for model in (self.model, self.ema.model):
                    compile_blocks(model.blocks, mixed_precision=config.mixed_precision)
        if is_sharded:
            shard([self.model, self.ema.model], config, world)
        is_recorded = config.records_steps(world.device.type)
        self.optimizer = build_optimizer(config, self.model, capturable=is_recorded)
        threads = min(world.all_gather(torch.get_num_threads()))  # hosts may have other numbers of cores
        self.micro_batches = MicroBatches(config, plan, world, threads)
        step = RecordedStep if is_recorded else EagerStep
        self.training_step = step(config, self.model, self.ema, self.optimizer, world, self.micro_batches)
        weights = [1.0 if config.token_weighted_loss else plan.weight(objective) for objective in Objective]
        self._loss_weights = torch.tensor(weights, device=world.device)
        self.sums, self.skipped_steps = self.training_step.sums, self.training_step.skipped_steps
        self.stop_signal = StopSignal(world)
        self.loader = BatchLoader(config, inputs, world, self.micro_batches, self.progress)
        self.words = WordCheckpoints(config, self.progress)
        self.validation = Validation(
            ValidationSettings.of(config), inputs.valid_store, world, inputs.vocab_size, inputs.special_ids
        )
        self.pairs = pairs
        measured_on = f"{self.validation}, {self.progress.validated_on}"
        if pairs and config.keep_best and config.keep_best.startswith("pairs/"):
            measured_on = pairs.digest
        self.best = BestCheckpoint(config, world, measured_on)
        self.step = 0
        self.saved_step: int | None = None  # of the newest checkpoint in this run's folder
        self._labels: dict[Objective, float] = {}  # of the steps of the last record
        self.pending: Collection[str] = ()  # records of the checkpoint that the run resumes from
        self._record = TrainingRecord(config, inputs.model_config, self.plan, world)
        self._warm_up()
        self.random_state = RandomState(config.seed, world)
        self.random_state.start()

    def run(self) -> None:
        """Train all remaining steps, with records, validation and checkpoints.

        After a step come checkpoints by words, the checkpoint, validation, and scores of minimal pairs, in this order:
        if a signal or a kill interrupts validation or scoring, the resumed run does it again.

        Raises:
            StoppedError: a signal requested a stop, and a checkpoint was saved.
        """
        config = self.config
        with ExitStack() as stack:
            settings = {**config.to_dict(), **dataclasses.asdict(self.inputs.model_config)}
            with self.world.errors_on_all_ranks():
                if "validation" in self.pending and self.world.is_main:
                    forget_from(config.run_dir / SAMPLES, self.step)
                if self.world.is_main:
                    self.best.start(self.step)
                samples = Samples(config, self.inputs.valid_store, self.world)
                trackers = Trackers(config, self.world, settings, self.step)
            stack.enter_context(self.stop_signal)  # before this a signal ends the run at once: nothing would be lost
            stack.enter_context(trackers)
            rows = stack.enter_context(Prefetcher(self.loader.load, self.step, config.max_steps))
            bar = stack.enter_context(progress_bar(config, self.world, self.step))
            try:
                if "validation" in self.pending:
                    self.validate(trackers, samples, bar)
                if self.pairs and "pairs" in self.pending:
                    self.score_pairs(self.pairs, trackers, bar)
                self._train(trackers, samples, rows, bar)
            except StopRequested:
                self._stop()

    def _train(self, trackers: Trackers, samples: Samples, rows: Prefetcher[list[LoadedShare]], bar: tqdm) -> None:
        """Take all remaining steps; raises StopRequested between steps, or between the parts of a validation."""
        config = self.config
        throughput = Throughput(self.plan.tokens_before(self.step))
        while self.step < config.max_steps:
            with throughput.waiting():
                step_rows = self._next_rows(rows)
            gradient_norm = self.train_step(step_rows)
            stops = self.stop_signal.should_stop()
            if schedules.is_due(self.step, config.log_every, config.max_steps):
                record = self.training_record(gradient_norm, throughput)
                trackers.log(self.step, record)
                bar.set_postfix_str(summary(record, "train"), refresh=False)
                with throughput.paused():
                    self.hooks.call("on_step", self.world, self.step, record)
            bar.update()
            with throughput.paused():
                if has_words := bool(self.words.due(self.step)):
                    self.save_words()
                is_due = schedules.is_due(self.step, config.save_every, config.max_steps, config.save_steps)
                if is_saved := stops or is_due or self.best.is_due(self.step):
                    self.save()
                if stops:
                    raise StopRequested
                if has_words or is_saved:  # which may have taken long
                    self.stop_signal.raise_if_asked()
                if schedules.is_due(self.step, config.validate_every, config.max_steps):
                    self.validate(trackers, samples, bar)
                if self.pairs and schedules.is_due(self.step, config.score_every, config.max_steps):
                    self.score_pairs(self.pairs, trackers, bar)
        if self.world.is_main and self._labels:
            steps = min(schedules.steps_since_due(self.step, config.log_every), self.step - self.progress.first_step)
            for line in figures.of_labels(self._labels, steps):
                log(line)
        if self.world.is_main and (line := str(self.best)):
            log(line)

    def _next_rows(self, rows: Prefetcher[list[LoadedShare]]) -> list[LoadedShare]:
        """This rank's rows of the step.

        If a signal arrives while this rank waits for them, all ranks stop before the step. On several GPUs they stop
        after it: this rank takes part with padding in place of its rows, which are then not trained on.

        Raises:
            StopRequested: on all ranks.
        """
        step_rows = None
        with suppress(StopRequested):
            step_rows = rows.get(self.step, self.stop_signal.raise_if_received)
        if self.stop_signal.stops_before_steps:
            self.stop_signal.raise_if_asked()
        if step_rows is None:
            log(
                f"rank {self.world.rank}: its rows of step {self.step + 1} did not come; the step is taken without them"
            )
            step_rows = self.loader.without_rows(self.step)
        return step_rows

    def validate(self, trackers: Trackers, samples: Samples, bar: tqdm) -> None:
        """Record the validation of this step; every rank must call it.

        The record is written last: once it exists, a resumed run has nothing to repeat.

        Raises:
            StopRequested: a signal came in the meantime; nothing is recorded.
        """
        own = len(self.validation.rows_of(self.world.rank))
        with validation_progress(bar, 2 * own) as show:  # the weights and their average
            record = self.validation_record(self._interruptible(show))
        guesses = samples(self.model, autocast(self.config, self.world.device))
        self.stop_signal.raise_if_asked()
        trackers.log_samples(self.step, guesses)
        self.best.note(self.step, record)
        trackers.log(self.step, record)
        if self.world.is_main:
            log(f"step {self.step}: validation {summary(record, 'validation')}")
        self.hooks.call("on_validation", self.world, self.step, record)

    def score_pairs(self, pairs: PairScores, trackers: Trackers, bar: tqdm) -> None:
        """Record the scores of minimal pairs, in the order of `validate`; every rank must call it."""
        with validation_progress(bar, pairs.num_predictions, "scoring pairs") as show:
            precision = autocast(self.config, self.world.device)
            record = pairs.record(self.ema.model, precision, self._interruptible(show))
        self.best.note(self.step, record)
        trackers.log(self.step, record)
        if self.world.is_main:
            log(f"step {self.step}: " + ", ".join(f"{name} {value:.1%}" for name, value in record.items()))

    def _interruptible(self, show: Callable[[int], None]) -> Callable[[int], None]:
        """`show`, after which StopRequested is raised if a signal came; every rank must call it equally often."""

        def advance(done: int) -> None:
            show(done)
            self.stop_signal.raise_if_asked()

        return advance

    def _stop(self) -> None:
        """Save a checkpoint of this step unless there is one, and end the run; every rank must call it."""
        if self.step == 0:
            raise KeyboardInterrupt  # nothing is trained that could be lost
        if self.saved_step != self.step:
            self.save()
        raise StoppedError(
            f"stopped by {self.stop_signal.received_name} after step {self.step}, with a checkpoint in "
            f"{self.config.run_dir}; the same command with --resume auto goes on"
        )

    def train_step(self, rows: list[LoadedShare]) -> Tensor:
        """Update the weights once and advance `step`, without a device sync.

        If the gradient norm is not finite on any rank, every rank leaves weights, EMA, optimizer state and loss sums
        unchanged.

        Args:
            rows: `BatchLoader.load(step)`.

        Returns:
            The global gradient norm before clipping, a scalar on the device.
        """
        batch = self.loader.batch(rows, self.step)
        scales, stop_requests = self._loss_scales(batch)
        self.stop_signal.note(stop_requests)
        micro_batches = self.micro_batches.cut(batch, self.step)
        self.training_step.accumulate(micro_batches, scales)
        gradient_norm = self.training_step.update(schedules.learning_rate(self.config, self.step))
        self.step += 1
        return gradient_norm

    def training_record(self, gradient_norm: Tensor, throughput: Throughput) -> dict[str, float]:
        """Means since the last record, and the last step's schedule values; every rank must call it.

        Raises:
            InputError: too many consecutive steps were skipped; see `_raise_errors`.
        """
        self._raise_errors()
        self.skipped_steps.raise_if_too_many(self.config.max_skipped_steps, self.step)
        means = self.sums.means(self.world)
        self._labels = self.sums.new_labels(means)
        self.sums.reset()
        epochs = {
            f"train/corpus/{name}/epochs": count for name, count in self.progress.epochs_before(self.step).items()
        }
        return (
            self._record(self.step, means, sum(self._labels.values()), gradient_norm, throughput)
            | {"train/skipped_steps": self.skipped_steps.total()}
            | self.words.record(self.step)
            | epochs
        )

    def validation_record(self, advance: Callable[[int], object] = lambda _: None) -> dict[str, float]:
        """Loss, perplexity and accuracy of the weights and of the EMA; every rank must call it.

        Args:
            advance: see `Validation.sums`.
        """
        models = dict(zip(VALIDATED, (self.model, self.ema.model), strict=True))
        return self.validation.record(models, autocast(self.config, self.world.device), advance)

    def save(self) -> None:
        """Write a checkpoint; every rank must call it, and returns once it is complete.

        Raises:
            InputError: weights are not finite, or writing failed; see `_raise_errors`.
        """
        self._agree_to_save()
        history = self.loader.mask_history
        state = Checkpoint(
            step=self.step,
            model=self.model.state_dict(),
            ema=self.ema.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            rank_states=self.world.all_gather(self.random_state.state_dict() | self.sums.state_dict()),
            skipped_steps=self.skipped_steps.counts,
            mask_counts=history.counts if history else None,
            is_compiled=self.is_compiled,
            progress=self.progress.state_dict(self.step),
        )
        path = checkpoint.save(state, self.config, self.inputs.model_config, self.world)
        self.saved_step = self.step
        self.hooks.call("on_checkpoint", self.world, self.step, path)

    def save_words(self) -> None:
        """Write the weights due at this number of words; every rank must call it, before `save` at the same step.

        Raises:
            InputError: see `save`.
        """
        self._agree_to_save()
        self.words.save(self.step, self.model, self.ema.model, self.inputs.model_config, self.world)

    def _raise_errors(self) -> None:
        """Raise InputError on all ranks if one failed to load rows, or the run's folder is gone."""
        with self.world.errors_on_all_ranks():
            self.loader.raise_load_error()
            if self.world.is_main:
                check_run_dir(self.config)

    def _agree_to_save(self) -> None:
        """Raise InputError on all ranks if weights are not finite; see `_raise_errors`."""
        self._raise_errors()
        norm = full_tensor(get_total_norm(self.model.parameters()))
        with self.world.errors_on_all_ranks():
            if not norm.isfinite():
                raise InputError(
                    f"training diverged: weights are not finite after step {self.step}; go on from a checkpoint before "
                    "(--resume PATH, another --name), with a lower --learning_rate, say"
                )

    def restore(self, resumed: Checkpoint, *, is_own: bool = False, pending: Collection[str] = ()) -> None:
        """Restore the state of a checkpoint; every rank must call it.

        Args:
            resumed: the checkpoint.
            is_own: whether it is in this run's folder.
            pending: "validation", "pairs" or both, if the run ended between it and that record of its step.

        Raises:
            InputError: a shard is corrupt.
        """
        self.step = resumed.step
        self.saved_step = resumed.step if is_own else None
        self.pending = pending
        if resumed.shards:
            with self.world.errors_on_all_ranks():
                states = (self.model.state_dict(), self.ema.model.state_dict())
                resumed = resumed.with_shards_loaded(*states, new_moments(self.optimizer))
        load_weights(self.model, resumed.model)
        load_weights(self.ema.model, resumed.ema)
        load_moments(self.optimizer, resumed.optimizer["state"])
        self.skipped_steps.counts.copy_(resumed.skipped_steps)
        if self.loader.mask_history and resumed.mask_counts is not None:  # a history that is new starts at zero
            self.loader.mask_history.counts.copy_(resumed.mask_counts)
        self.random_state.load_rank_states(resumed.rank_states, self.step)
        self.sums.load_rank_states(resumed.rank_states, self.world)

    def _loss_scales(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """[objectives] scales of the loss sums on this rank (docs/model.md#loss), and the number of stop requests.

        Means are over the labels of all ranks, so label counts are all-reduced first: two integers, and a third for
        `StopSignal`, which saves it an all-reduce of its own. A factor cancels data parallelism's averaging of
        gradients over ranks.
        """
        counts = torch.cat([batch.label_counts, self.stop_signal.requests().reshape(1)])
        counts = self.world.all_reduce_sum(counts)
        totals, stop_requests = counts[:-1], counts[-1]
        if self.config.token_weighted_loss:
            totals = totals.sum().expand_as(totals)
        return self._loss_weights * self.training_step.averaged_ranks / totals.clamp(min=1), stop_requests

    def _warm_up(self) -> None:
        """Before the first step, compile every graph that the run needs and let DDP rebuild its buckets.

        DDP rebuilds them after the first backward. With more than two ranks, bucket boundaries change the order of
        summation, so the first step of a resumed run must use the boundaries of an uninterrupted one.

        Raises:
            InputError: the model cannot be compiled on this machine.
        """
        has_buckets = self.world.world_size > 1 and not isinstance(self.training_step, RecordedStep)
        if not self.is_compiled and not has_buckets:
            return
        with compiling():
            for factor in sorted(self.plan.length_factors if self.is_compiled else {1}):
                batch = Batch.padding(factor * self.config.seq_length, self.world.device)
                self.training_step.warm_up(batch)
            if self.is_compiled:
                self.training_step.warm_up_evaluation(Batch.padding(self.config.seq_length, self.world.device))
