"""The training loop: one step, and the run around it."""

import dataclasses
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from gptbert import compile_choice, schedules
from gptbert.checkpoint import checkpoint
from gptbert.checkpoint.checkpoint import Checkpoint
from gptbert.checkpoint.folder import saved_setting
from gptbert.checkpoint.initial_weights import read_initial_weights
from gptbert.checkpoint.resume import changed_settings, find_for_all_ranks
from gptbert.checkpoint.word_checkpoints import WordCheckpoints
from gptbert.config import TrainConfig
from gptbert.data.hybrid_plan import HybridPlan
from gptbert.data.inputs import Inputs
from gptbert.data.loader import BatchLoader, LoadedShare, training_streams
from gptbert.data.mask_history import check_counts
from gptbert.data.micro_batch import MicroBatches
from gptbert.data.objectives import Batch, Objective
from gptbert.data.packing import Prefetcher
from gptbert.distributed.fsdp import full_tensor, load_moments, load_weights, new_moments, reshard, shard, shard_size
from gptbert.distributed.memory import peak_memory
from gptbert.distributed.stop_signal import StopSignal
from gptbert.distributed.world import World, connect
from gptbert.errors import InputError, StoppedError
from gptbert.io.screen import log
from gptbert.kernel_check import kernel_check, run_of
from gptbert.model import GPTBert
from gptbert.model.compilation import compile_blocks, compiling
from gptbert.monitoring.flops import measure_matmul_flops, training_flops
from gptbert.monitoring.metrics import LossSums, Throughput, training_losses
from gptbert.monitoring.progress import print_header, progress_bar, summary
from gptbert.monitoring.samples import Samples
from gptbert.monitoring.skipped_steps import SkippedSteps
from gptbert.monitoring.trackers import Trackers
from gptbert.monitoring.validation import Validation, ValidationSettings
from gptbert.optim import WeightAverage, build_optimizer, update_weights
from gptbert.preparation import prepare_cpp_kernels, prepare_kernels, prepare_run_dir
from kernels import MaskedCrossEntropy


def fit(config: TrainConfig) -> None:
    """Train as `config` says, from the start or from a checkpoint.

    Raises:
        InputError: on every rank, with one message, where anything given cannot be used.
        LostProcessError: see `connect`.
        StoppedError: a signal asked for it, and a checkpoint was saved; see `StopSignal`.
    """
    with connect(config) as world:
        _fit(config, world)  # all that holds the processes' group is gone when it returns


def _fit(config: TrainConfig, world: World) -> None:
    with world.errors_on_all_ranks():
        backend = prepare_kernels(config, world)
        inputs = Inputs.open(config)
        plan = HybridPlan(config, world.world_size)
    is_checked = backend == "triton" and config.kernel_check == "on"
    run = run_of(config, inputs.model_config, plan, world) if is_checked else None
    with kernel_check(run, world.device) as finish_check:
        with world.errors_on_all_ranks():
            inputs.check_ids(world.rank, world.world_size)
            shard_size(config, world)  # or an InputError
            words = WordCheckpoints(config, training_streams(config, inputs, plan), plan)
        with world.errors_on_all_ranks():
            if len(set(world.all_gather(config))) > 1:
                raise InputError("the processes were given different flags; every host must start the same command")
        path, resumed = find_for_all_ranks(config, inputs.model_config, world)
        first_step = resumed.step if resumed else 0
        with world.errors_on_all_ranks():
            check_counts(resumed.mask_counts if resumed and config.mask_history else None, inputs.num_train_tokens)
            initial_weights = None if resumed else read_initial_weights(config, inputs.model_config)
            if first_step >= config.max_steps and config.resume != "auto":
                raise InputError(f"--resume {path}: its step {first_step} is the end of --max_steps {config.max_steps}")
        if first_step >= config.max_steps:
            if world.is_main:
                log(f"{config.name}: finished already, {path} is step {first_step} of {config.max_steps}")
            return
        with world.errors_on_all_ranks():
            finish_check()
    was_asked = resumed is None or saved_setting(path, "compile") is not False
    choice = compile_choice.choose(config, inputs.model_config, plan, world, resumed, was_asked)
    with world.errors_on_all_ranks():
        backend = prepare_cpp_kernels(config, world, is_compiled=choice.is_compiled)
        if world.is_main:
            prepare_run_dir(config, inputs.model_config, world, backend)
    if world.is_main:
        print_header(config, inputs, plan, world, backend, words)
        log(str(choice))
        if resumed:
            changes = changed_settings(path, config)
            log(f"going on from {path}" + (f"; changed since: {', '.join(changes)}" if changes else ""))
        elif initial_weights:
            log(f"starting from the weights of {config.initial_weights}")
    trainer = Trainer(config, inputs, plan, world, initial_weights, is_compiled=choice.is_compiled)
    if world.is_main and len(inputs.train_stores) > 1:
        log(trainer.rows.describe_corpora())
    if resumed:
        trainer.restore(resumed)
        del resumed  # as large as the run's own state
    trainer.run()


class Trainer:
    """A run in progress, as one rank sees it."""

    def __init__(
        self,
        config: TrainConfig,
        inputs: Inputs,
        plan: HybridPlan,
        world: World,
        initial_weights: dict[str, Tensor] | None = None,
        *,
        is_compiled: bool | None = None,
    ) -> None:
        self.config = config
        self.inputs = inputs
        self.plan = plan
        self.world = world
        torch.manual_seed(config.seed)  # the same weights on every rank
        self.model = GPTBert(inputs.model_config)
        if initial_weights:
            self.model.load_state_dict(initial_weights)
        is_sharded = config.parallel == "fsdp" and world.world_size > 1
        if not is_sharded:  # `shard` moves it there block by block
            self.model.to(world.device)
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
        self.parallel_model = world.wrap(self.model)
        self.optimizer = build_optimizer(config, self.model)
        self.sums = LossSums(world.device)
        self.skipped_steps = SkippedSteps(world.device)
        self.stop_signal = StopSignal(world)
        self.micro_batches = MicroBatches(config, plan, world)
        self.rows = BatchLoader(config, inputs, plan, world, self.micro_batches)
        self.words = WordCheckpoints(config, self.rows.streams, plan)
        self.validation = Validation(ValidationSettings.of(config), inputs.valid_store, world, inputs.vocab_size)
        self.step = 0
        dtype = torch.bfloat16 if config.mixed_precision else torch.float32
        self.measure_matmul_flops = measure_matmul_flops(world.device, dtype, quick=True)
        self._warm_up()
        torch.manual_seed((config.seed << 20) + world.rank)  # different dropout on every rank

    def run(self) -> None:
        """All steps that are left, with records, validations and checkpoints on the way.

        Raises:
            StoppedError: after a checkpoint, where a signal asked for it.
        """
        config = self.config
        with ExitStack() as stack:
            stop_signal = stack.enter_context(self.stop_signal)
            settings = {**config.to_dict(), **dataclasses.asdict(self.inputs.model_config)}
            with self.world.errors_on_all_ranks():
                trackers = stack.enter_context(Trackers(config, self.world, settings, self.step))
                samples = Samples(config, self.inputs.valid_store, self.world)
            rows = stack.enter_context(Prefetcher(self.rows.load, self.step, config.max_steps))
            bar = stack.enter_context(progress_bar(config, self.world, self.step))
            throughput = Throughput(self.plan.tokens_before(self.step))
            while self.step < config.max_steps:
                with throughput.waiting():
                    step_rows = rows.get(self.step)
                gradient_norm = self.train_step(step_rows)
                self.step += 1
                last = self.step == config.max_steps
                stops = stop_signal.should_stop(self.stop_requests) and not last
                if last or self.step % config.log_every == 0:
                    record = self.training_record(gradient_norm, throughput)
                    trackers.log(self.step, record)
                    bar.set_postfix_str(summary(record, "train"), refresh=False)
                bar.update()
                with throughput.paused():
                    if last or (config.validate_every and self.step % config.validate_every == 0):
                        record = self.validation_record()
                        trackers.log(self.step, record)
                        trackers.log_samples(self.step, samples(self.model, self._precision()))
                        if self.world.is_main:
                            log(f"step {self.step}: validation {summary(record, 'validation')}")
                    if self.words.due(self.step):
                        self.save_words()
                    if last or stops or (config.save_every and self.step % config.save_every == 0):
                        self.save()
                if stops:
                    raise StoppedError(
                        f"stopped by {stop_signal.received_name} after step {self.step}, with a checkpoint in "
                        f"{config.run_dir}; the same command with --resume auto goes on"
                    )

    def train_step(self, rows: list[LoadedShare]) -> Tensor:
        """One update of the weights; reads nothing back from the device.

        If the gradients of any rank are not finite, the weights, their average, the optimizer's state and the sums of
        losses stay as they are on every rank.

        Args:
            rows: from `BatchLoader.load` of this step.

        Returns:
            The gradient's global norm before clipping, a scalar on the device.
        """
        batches = self.rows.batches(rows, self.step)
        scales = self._loss_scales(batches)
        pieces = self.micro_batches.cut(batches, self.step)
        sums = LossSums(self.world.device)
        for index, parts in enumerate(pieces):
            with self._synchronized(is_last=index == len(pieces) - 1):
                results = self._forward(parts)
                totals = [result.total * scales[part.objective] for part, result in zip(parts, results, strict=True)]
                sum(totals[1:], totals[0]).backward()
            for part, result in zip(parts, results, strict=True):
                sums.add(part.objective, result)
        for group in self.optimizer.param_groups:
            group["lr"] = schedules.learning_rate(self.config, self.step)
        gradient_norm = update_weights(self.optimizer, self.model, self.ema, self.config.max_gradient)
        self.optimizer.zero_grad()
        self.sums.add_where(self.skipped_steps.add(gradient_norm), sums)
        return gradient_norm

    def training_record(self, gradient_norm: Tensor, throughput: Throughput) -> dict[str, float]:
        """Means since the last record, and the schedules' values at the step just done; every rank must call it.

        Raises:
            InputError: too many steps one after another were skipped, or rows were left out.
        """
        self.rows.raise_load_errors()
        self.skipped_steps.raise_if_too_many(self.config.max_skipped_steps, self.step)
        step = self.step - 1
        means = self.sums.means(self.world)
        self.sums = LossSums(self.world.device)
        weights = {objective: self.plan.weight(objective) for objective in means}
        if self.config.token_weighted_loss:
            weights = {objective: values["count"] for objective, values in means.items()}
        tokens, words = self.plan.tokens_before(self.step), self.words.words_before(self.step)
        return (
            training_losses(means, weights)
            | {
                "train/gradient_norm": gradient_norm.item(),
                "train/skipped_steps": self.skipped_steps.total(),
                "train/tokens": tokens,
            }
            | {f"train/{name}": value for name, value in schedules.values(self.config, step).items()}
            | ({} if words is None else {"train/words": words})
            | {f"train/corpus/{name}/epochs": epochs for name, epochs in self.rows.epochs_before(self.step).items()}
            | self._speed(tokens, sum(values["count"] for values in means.values()), throughput)
        )

    def _speed(self, tokens: int, labels: float, throughput: Throughput) -> dict[str, float]:
        """What the run makes of its machines, since the last record.

        Args:
            tokens: seen by now.
            labels: since the last record.
            throughput: of the run.
        """
        before = throughput.tokens
        rate, waiting_share = throughput.since_last(tokens)
        length = schedules.sequence_length(self.config, self.step - 1)
        flops = training_flops(self.inputs.model_config, length, labels / max(1, tokens - before))
        return {
            "train/tokens_per_second": rate,
            "train/mfu": rate * flops / (self.world.world_size * self.measure_matmul_flops),
            "train/waiting_share": waiting_share,
            "train/peak_memory_gb": peak_memory(self.world.device) / 1e9,
        }

    def validation_record(self) -> dict[str, float]:
        """Loss, perplexity and accuracy of the weights and of their average; every rank must call it."""
        record = {}
        for prefix, model in (("validation", self.model), ("validation_ema", self.ema.model)):
            for objective, values in self.validation(model, self._precision()).items():
                for name in ("loss", "perplexity", "accuracy"):
                    record[f"{prefix}/{objective.value}/{name}"] = values[name]
        return record

    def save(self) -> None:
        """Write a checkpoint; every rank must call it, and all wait until it is complete.

        Raises:
            InputError: weights are not finite, or rows were left out, or the disk refuses.
        """
        self._agree_to_save()
        random_state = {"cpu": torch.get_rng_state()}
        if self.world.device.type == "cuda":
            random_state["cuda"] = torch.cuda.get_rng_state(self.world.device)
        rank_states = self.world.all_gather({"random": random_state, "sums": self.sums.sums.cpu()})
        state = Checkpoint(
            step=self.step,
            model=self.model.state_dict(),
            ema=self.ema.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            rank_states=rank_states,
            skipped_steps=self.skipped_steps.counts,
            mask_counts=self.rows.mask_history.counts if self.rows.mask_history else None,
            is_compiled=self.is_compiled,
        )
        checkpoint.save(state, self.config, self.inputs.model_config, self.world)

    def save_words(self) -> None:
        """Write the weights that are due by words seen; every rank must call it, before `save` at the same step.

        Raises:
            InputError: see `save`.
        """
        self._agree_to_save()
        self.words.save(self.step, self.model, self.ema.model, self.inputs.model_config, self.world)

    def _agree_to_save(self) -> None:
        """Raise InputError on all ranks where weights are not finite, or rows were left out."""
        self.rows.raise_load_errors()
        norm = full_tensor(get_total_norm(self.model.parameters()))
        with self.world.errors_on_all_ranks():
            if not norm.isfinite():
                raise InputError(
                    f"training diverged: weights are not finite after step {self.step}; go on from a checkpoint before "
                    "(--resume PATH, another --name), with a lower --learning_rate, say"
                )

    def restore(self, resumed: Checkpoint) -> None:
        """Go on where a checkpoint was written; every rank must call it.

        Raises:
            InputError: shards are damaged.
        """
        self.step = resumed.step
        if resumed.shards:
            with self.world.errors_on_all_ranks():
                states = (self.model.state_dict(), self.ema.model.state_dict())
                resumed = resumed.with_shards_loaded(*states, new_moments(self.optimizer))
        load_weights(self.model, resumed.model)
        load_weights(self.ema.model, resumed.ema)
        load_moments(self.optimizer, resumed.optimizer["state"])
        self.skipped_steps.counts.copy_(resumed.skipped_steps)
        if self.rows.mask_history and resumed.mask_counts is not None:
            self.rows.mask_history.counts.copy_(resumed.mask_counts)
        generators = {"cpu", self.world.device.type}
        if [set(state["random"]) for state in resumed.rank_states] == [generators] * self.world.world_size:
            mine = resumed.rank_states[self.world.rank]
            torch.set_rng_state(mine["random"]["cpu"])
            if self.world.device.type == "cuda":
                torch.cuda.set_rng_state(mine["random"]["cuda"], self.world.device)
            self.sums.sums.copy_(mine["sums"])
        else:  # other ranks or devices than before: dropout goes on with new random numbers
            torch.manual_seed((self.config.seed << 20) + (self.step << 10) + self.world.rank)
            if self.world.is_main:
                self.sums.sums.copy_(sum(state["sums"] for state in resumed.rank_states))

    def _loss_scales(self, batches: list[Batch]) -> dict[Objective, Tensor]:
        """Factors that turn a rank's sums into its part of the step's loss (docs/model.md#loss).

        Means are over the labels of all ranks, so their numbers are added up first: two integers, and a third one for
        `StopSignal`, so that ranks agree on it for free. The data-parallel backward averages over ranks, which the
        factor world_size undoes.
        """
        counts = {objective: torch.zeros((), dtype=torch.int64, device=self.world.device) for objective in Objective}
        for batch in batches:
            counts[batch.objective] = batch.label_count
        sums = [*(counts[objective] for objective in Objective), self.stop_signal.requests()]
        *totals, self.stop_requests = self.world.all_reduce_sum(torch.stack(sums)).unbind()
        totals = torch.stack(totals).clamp(min=1)
        if self.config.token_weighted_loss:
            return dict.fromkeys(Objective, self.world.world_size / totals.sum())
        return {
            objective: self.plan.weight(objective) * self.world.world_size / total
            for objective, total in zip(Objective, totals, strict=True)
        }

    @torch.no_grad()
    def _warm_up_evaluation(self) -> None:
        """Once for the weights and once for their average, which want no gradients and so have code of their own."""
        batch = Batch.padding(self.config.seq_length, self.world.device)
        for model in (self.model.eval(), self.ema.model):
            with self._precision():
                model.encode(batch.input_ids, batch.document_ids, batch.objective.causal)
            reshard(model)
        self.model.train()

    def _forward(self, parts: list[Batch]) -> list[MaskedCrossEntropy]:
        """The sums of each part; all of them go through the model together."""
        with self._precision():
            return self.parallel_model(
                torch.cat([part.input_ids for part in parts]),
                torch.cat([part.document_ids for part in parts]),
                torch.cat([part.labels for part in parts]),
                torch.cat([part.is_causal for part in parts]),
                self.config.z_loss_weight,
                parts=[(len(part.labels), self.micro_batches.label_capacity(part)) for part in parts],
            )

    def _synchronized(self, is_last: bool) -> AbstractContextManager:
        """Gradients are reduced over ranks once a step, in the backward of the last micro-batch."""
        if isinstance(self.parallel_model, FSDPModule):
            self.parallel_model.set_requires_gradient_sync(is_last)
        if is_last or not isinstance(self.parallel_model, DistributedDataParallel):
            return nullcontext()
        return self.parallel_model.no_sync()

    def _precision(self) -> AbstractContextManager:
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.config.mixed_precision)

    def _warm_up(self) -> None:
        """Compile the model for all that the run will need, and let DDP arrange its buckets, before the first step.

        DDP does so after the first backward, which moves bucket borders and with them the order of additions among more
        than two ranks. A resumed run must not take its first step with other borders than the run that went on.

        Raises:
            InputError: the model cannot be compiled here.
        """
        if not self.is_compiled and self.world.world_size == 1:
            return
        with compiling():
            for factor in sorted(self.plan.length_factors if self.is_compiled else {1}):
                batch = Batch.padding(factor * self.config.seq_length, self.world.device)
                self._forward([batch])[0].total.backward()
            if self.is_compiled:
                self._warm_up_evaluation()
        self.optimizer.zero_grad()
