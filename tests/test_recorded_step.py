"""Recorded steps: the bits of eager ones, in emulated CUDA graphs."""

import json
import math
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from gptbert import schedules
from gptbert.checkpoint.folder import list_checkpoints
from gptbert.command_line import parse
from gptbert.config import TrainConfig
from gptbert.data import objectives
from gptbert.data.hybrid_plan import HybridPlan
from gptbert.data.inputs import Inputs
from gptbert.data.micro_batch import MicroBatches
from gptbert.distributed.world import World, connect
from gptbert.errors import InputError
from gptbert.model.batch import Batch
from gptbert.train import fit
from gptbert.trainer import Trainer
from gptbert.training import cuda_graph
from gptbert.training import step as step_module
from kernels import wanted
from kernels.backend import set_default_backend
from tests.emulated_graph import emulate
from tests.runs import MODEL, assert_same, assert_same_checkpoint, flags, on_ranks, write_inputs

ALONE = World(0, 1, torch.device("cpu"))
UPDATE = "the update of the weights"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("recorded"), train_characters=30_000)


def make_trainer(inputs, *, recorded, **changes):
    settings = {"global_batch_size": 16, "local_batch_size": 4, "batch_reduction": 4, "no_compile": True}
    mode = "on" if recorded else "off"
    config = parse(TrainConfig, flags(inputs, cuda_graph=mode, **settings | changes))
    trainer = Trainer(config, Inputs.open(config), HybridPlan(config, 1), ALONE)
    trainer.micro_batches.has_fixed_shapes = True  # for both, so that they run the same operations
    return trainer


def steps_of(trainer, steps):
    """Gradient norms, loss sums and final weights of some steps."""
    norms = []
    for trainer.step in steps:
        norms.append(trainer.train_step(trainer.loader.load(trainer.step)))
    weights = [*trainer.model.parameters(), *trainer.ema.model.parameters()]
    counts = trainer.skipped_steps.counts
    return [torch.stack(norms).nan_to_num(), trainer.sums.sums, counts, *weights], trainer.optimizer.state_dict()[
        "state"
    ]


def poison(trainer, step):
    """Make the loss infinite at one step, without a change of what a graph has recorded."""
    scales = trainer._loss_scales

    def poisoned(batch):
        factors, requests = scales(batch)
        return factors * (math.inf if trainer.step == step else 1.0), requests

    trainer._loss_scales = poisoned


@pytest.mark.parametrize("optimizer", ["lamb", "adamw", "muon"])
def test_recorded_steps_have_the_bits_of_eager_ones(inputs, monkeypatch, optimizer):
    """Over growing batches, two row lengths, changing masks and a skipped step."""
    emulate(monkeypatch)
    ends = []
    for recorded in (True, False):
        settings = {"optimizer": optimizer, "seq_length_growth": True, "max_steps": 10, "mask_history": True}
        trainer = make_trainer(inputs, recorded=recorded, **settings)
        poison(trainer, 4)
        ends.append(steps_of(trainer, (2, 3, 4, 5, 7, 8)))
        if recorded:
            recorder, kept = trainer.training_step.recorder, len(trainer.training_step._passes)
    assert_same(*ends)
    assert ends[0][0][2].tolist() == [1, 0, 1], "one step was skipped"
    passes = [name for name in recorder.recorded if name != UPDATE]
    assert passes == ["forward and backward of 4 rows", "forward and backward of 2 rows"]
    assert recorder.recorded.count(UPDATE) == (optimizer != "muon")
    assert recorder.replays > 15
    assert kept == 1, "graphs of former shapes are dropped"


FEW_ROWS = {"seq_length": 16, "global_batch_size": 4, "local_batch_size": 2, "batch_reduction": 1}


@pytest.fixture
def quick_masks(monkeypatch):
    """Masks by PyTorch: rows are masked outside of what is recorded, and the interpreter takes long for it."""
    monkeypatch.setattr(objectives, "span_mask", partial(objectives.span_mask, backend="torch"))


def wide_model(inputs):
    """A config of one head, which is wide enough for fused attention."""
    file = inputs / "wide.json"
    file.write_text(json.dumps(MODEL | {"hidden_size": 32, "num_attention_heads": 1, "num_hidden_layers": 1}))
    return file


@pytest.mark.usefixtures("quick_masks")
def test_tritons_launches_are_recorded(inputs, monkeypatch):
    """Of several micro-batches, whose gradients are added; and weights that something else changes between steps."""
    emulate(monkeypatch)
    set_default_backend("triton")
    wanted.use_fused(wanted.FUSED)
    ends = []
    for recorded in (True, False):
        trainer = make_trainer(inputs, recorded=recorded, config_file=wide_model(inputs), **FEW_ROWS)
        first = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        torch.manual_seed(0)  # of dropout's seeds
        before = steps_of(trainer, range(1, 2))[0][0]  # the learning rate of step 0 is 0
        trainer.model.load_state_dict(first)
        torch.manual_seed(0)
        again = steps_of(trainer, range(1, 2))[0]
        assert torch.equal(again[0], before), "the step of the weights that were put back"
        ends.append((again, {}))
        if recorded:
            recorder = trainer.training_step.recorder
    assert_same(*ends)
    assert recorder.recorded == ["forward and backward of 2 rows", UPDATE]
    assert recorder.replays == 2 * (2 + 1), "of two steps with two micro-batches"
    packed = list(trainer.training_step._weights._all())
    assert all(each.gradient is not None and not each.overwrites for each in packed), "gradients are added"


@pytest.mark.usefixtures("quick_masks")
@pytest.mark.parametrize(("operations", "overwritten"), [(wanted.FUSED, 5), (("gated_norm", "normalize"), 3)])
def test_what_one_micro_batch_overwrites_need_not_be_cleared(inputs, monkeypatch, operations, overwritten):
    """Gradients as if they were added to zeros, from memory of NaN, also in a replay.

    Of attention that is not fused they are autograd's, so they are added and cleared.
    """
    emulate(monkeypatch)
    set_default_backend("triton")
    wanted.use_fused(operations)
    settings = {"config_file": wide_model(inputs), **FEW_ROWS, "global_batch_size": 2}
    gradients = []
    for are_single in (True, False):
        with patch.object(MicroBatches, "are_single", are_single):
            trainer = make_trainer(inputs, recorded=True, **settings)
        step, memory = trainer.training_step, trainer.training_step._gradients
        assert sum(packed.overwrites for packed in step._weights._all()) == overwritten * are_single
        (micro_batch,) = trainer.micro_batches.cut(trainer.loader.batch(trainer.loader.load(1), 1), 1)
        for _ in range(1 + are_single):
            memory.zero_()
            memory.buffer[len(memory._added) :].fill_(math.nan)
            torch.manual_seed(0)  # of dropout's seeds
            step.accumulate([micro_batch], torch.tensor([0.3, 0.7]))
            gradients.append([param.grad.clone() for param in trainer.model.parameters()])
        if are_single:
            with pytest.raises(RuntimeError, match=r"^2 micro-batches in a step of a run whose steps have one each$"):
                step.accumulate([micro_batch] * 2, torch.tensor([0.3, 0.7]))
            assert step.recorder.replays == 1
    assert_same((gradients[0], {}), (gradients[1], {}))
    for actual, expected in zip(*gradients[1:], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)
        assert actual.any()


@pytest.mark.usefixtures("quick_masks")
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_copies_by_lambs_own_pass_are_those_made_after_it(inputs, monkeypatch):
    """The weights that products read; over a skipped step, and after a checkpoint is loaded."""
    emulate(monkeypatch)
    set_default_backend("triton")
    wanted.use_fused(("gated_norm",))  # which alone makes products read copies
    settings = {"recorded": True, "config_file": wide_model(inputs), **FEW_ROWS, "global_batch_size": 2}
    update, ends = step_module.update_weights, []
    for by_lamb in (True, False):
        if not by_lamb:
            monkeypatch.setattr(step_module, "update_weights", copying_afterwards(update))
        trainer = make_trainer(inputs, **settings)
        poison(trainer, 1)
        before = steps_of(trainer, range(3))[0]
        states = trainer.model.state_dict(), trainer.optimizer.state_dict()
        trainer = make_trainer(inputs, **settings)
        trainer.model.load_state_dict(states[0])
        trainer.optimizer.load_state_dict(states[1])
        ends.append(([*before, *steps_of(trainer, range(3, 5))[0]], {}))
    assert_same(*ends)
    assert ends[0][0][2].tolist() == [1, 0, 1], "one step was skipped"


def copying_afterwards(update):
    def planted(optimizer, model, average, max_grad_norm, copies):
        norm = update(optimizer, model, average, max_grad_norm)
        with torch.no_grad():
            for param, copy in copies.items():
                copy.copy_(param)
        return norm

    return planted


@pytest.mark.parametrize(
    "changes", [{"activation_checkpointing": True}, {"local_batch_size": 1}, {"hybrid_numerator": 4}]
)
def test_recorded_steps_of_other_kinds(inputs, monkeypatch, changes):
    emulate(monkeypatch)
    ends = [steps_of(make_trainer(inputs, recorded=recorded, **changes), range(3)) for recorded in (True, False)]
    assert_same(*ends)


def keep_rows(step, monkeypatch):
    monkeypatch.setattr(Batch, "copy_", lambda self, other: None)


def keep(is_kept):
    """Never fill in later values of some tensors."""

    def plant(step, monkeypatch):
        refilled = step_module._refilled
        planted = lambda tensor, new: tensor if tensor is not None and is_kept(new) else refilled(tensor, new)  # noqa: E731
        monkeypatch.setattr(step_module, "_refilled", planted)

    return plant


def rate_as_number(step, monkeypatch):
    set_rate = step._set_learning_rate
    numbers = iter(schedules.learning_rate(step._config, number) for number in range(99))
    planted = lambda rate: set_rate(next(numbers) if isinstance(rate, torch.Tensor) else rate)  # noqa: E731
    monkeypatch.setattr(step, "_set_learning_rate", planted)


def new_gradients(step, monkeypatch):
    monkeypatch.setattr(step, "_clear_gradients", step._optimizer.zero_grad)


@pytest.mark.parametrize(
    "plant",
    [keep_rows, keep(lambda new: new.ndim == 2), keep(lambda new: new.ndim == 1), rate_as_number, new_gradients],
    ids=["rows", "seeds", "scales", "learning rate", "gradients"],
)
def test_what_a_recording_would_not_follow_is_found(inputs, monkeypatch, plant):
    """The last two are right wherever nothing is recorded."""
    emulate(monkeypatch)
    right = steps_of(make_trainer(inputs, recorded=False), range(4))
    trainer = make_trainer(inputs, recorded=True)
    plant(trainer.training_step, monkeypatch)
    wrong = steps_of(trainer, range(4))
    assert trainer.training_step.recorder.recorded
    with pytest.raises(AssertionError):
        assert_same(wrong, right)


def waiting(function):
    """The function, after a read from the device."""
    return lambda batch, *others: (batch.labels.sum().item(), function(batch, *others))


WHY = (
    "--cuda_graph: forward and backward of 4 rows cannot be recorded (aten::_local_scalar_dense: operation not "
    "permitted when stream is capturing); this run goes on without, in the same bits"
)


def test_where_a_recording_fails_the_run_goes_on(inputs, monkeypatch, capfd):
    """For instance where an operation waits for the device."""
    emulate(monkeypatch)
    ends = []
    for recorded in (True, False):
        trainer = make_trainer(inputs, recorded=recorded)
        step = trainer.training_step
        if recorded:
            recorder = step.recorder
            monkeypatch.setattr(step, "_add_gradients", waiting(step._add_gradients))
        ends.append(steps_of(trainer, range(4)))
    assert_same(*ends)
    assert recorder.recorded == []
    assert capfd.readouterr().err.splitlines() == [WHY]


def ranks_of_which_one_cannot_record(rank, inputs, results):
    """Lines, recordings and final weights."""
    said = []
    cuda_graph.log = said.append
    settings = {"hybrid_mode": "batch", "global_batch_size": 8, "local_batch_size": 4, "batch_reduction": 1}
    config = parse(TrainConfig, flags(inputs, cuda_graph="on", no_compile=True, timeout=60, **settings))
    with pytest.MonkeyPatch.context() as patched, connect(config) as world:
        emulate(patched)
        trainer = Trainer(config, Inputs.open(config), HybridPlan(config, world.world_size), world)
        step = trainer.training_step
        if rank == 1:
            patched.setattr(step, "_add_gradients", waiting(step._add_gradients))
        norms, _, _, *weights = steps_of(trainer, range(4))[0]
        results.put((rank, (said, step.recorder.recorded, norms.tolist(), [weight.tolist() for weight in weights])))
        del trainer, step  # before the process group is destroyed


def test_a_rank_that_cannot_record_says_so_itself(inputs):
    """The others replay their recordings, and all have the same weights."""
    said = on_ranks(2, ranks_of_which_one_cannot_record, inputs)
    assert [said[rank][0] for rank in range(2)] == [[], [f"rank 1: {WHY}"]]
    assert [said[rank][1] for rank in range(2)] == [["forward and backward of 4 rows", UPDATE], []]
    assert said[0][2:] == said[1][2:]


@pytest.mark.parametrize("error", [None, RuntimeError("operation not permitted when stream is capturing")])
def test_a_failed_recording_is_ended_for_random_numbers_and_memory(monkeypatch, capfd, error):
    """PyTorch 2.11 does not do so itself where CUDA has ended the recording; with stand-ins for a GPU's functions."""
    ended, stream = [], SimpleNamespace(device_index=3)
    stand_ins = {"CUDAGraph": lambda: SimpleNamespace(replay="a replay"), "graph_pool_handle": lambda: (0, 7)}
    stand_ins |= {"stream": lambda _: nullcontext(), "current_stream": lambda: stream}
    stand_ins |= {"graph": lambda graph, pool, stream, capture_error_mode: nullcontext()}
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(cuda_graph, "end_failed_capture", lambda *which: ended.append(which))
    recorder = cuda_graph.Recorder(ALONE.device)
    recorder.is_on, recorder._stream = True, stream

    def function():
        if error:
            raise error

    assert recorder.record(function, "a step") == (None if error else "a replay")
    assert ended == ([(3, (0, 7))] if error else [])
    assert ("a step cannot be recorded (operation not" in capfd.readouterr().err) == bool(error)


def test_warming_up_is_on_the_recordings_stream(inputs, monkeypatch):
    """Where compiled code is made before the first step: autograd's nodes of parameters keep their stream."""
    step = make_trainer(inputs, recorded=True).training_step
    seen, run, forward = [], step.recorder.run, step.forward
    monkeypatch.setattr(step.recorder, "run", lambda function: (seen.append("on"), run(function), seen.append("off")))
    monkeypatch.setattr(step, "forward", lambda *rows: seen.append("forward") or forward(*rows))
    step.warm_up(Batch.padding(16, ALONE.device))
    assert seen == ["on", "forward", "off"]
    assert not step._gradients.buffer.any()


def test_a_recorded_run_is_resumed_to_the_bit(inputs, monkeypatch):
    emulate(monkeypatch)
    settings = {"max_steps": 8, "save_every": 4, "no_compile": True, "keep_checkpoints": 9, "kernels": "torch"}
    for name in ("whole", "again"):
        resumed = {"resume": inputs / "runs" / "whole" / "checkpoints" / "step_00000004"} if name == "again" else {}
        fit(parse(TrainConfig, flags(inputs, name=name, cuda_graph="on", **settings, **resumed)))
    ends = [list_checkpoints(inputs / "runs" / name)[-1] for name in ("whole", "again")]
    assert_same_checkpoint(*ends)
    state = torch.load(ends[0] / "training_state.pt", weights_only=True)
    assert {type(group["lr"]) for group in state["optimizer"]["param_groups"]} == {float}


@pytest.mark.parametrize(
    ("changes", "device", "is_recorded"),
    [({}, "cuda", True), ({}, "cpu", False), ({"parallel": "fsdp"}, "cuda", False), ({"cuda_graph": "on"}, "cpu", True),
     ({"cuda_graph": "off"}, "cuda", False)],
)  # fmt: skip
def test_steps_are_recorded_on_gpus(make_config, changes, device, is_recorded):
    assert make_config(**changes).records_steps(device) is is_recorded


def test_sharded_steps_cannot_be_recorded(make_config):
    with pytest.raises(InputError, match=r"^--cuda_graph on: .* --parallel fsdp .*; use auto or off, or ddp$"):
        make_config(cuda_graph="on", parallel="fsdp")
