"""Training steps under the GPU's rules, on a device without data: requirements of capturing a step in a CUDA graph."""

from contextlib import nullcontext

import pytest
import torch

from gptbert.command_line import parse
from gptbert.config import TrainConfig
from gptbert.data.hybrid_plan import HybridPlan
from gptbert.data.inputs import Inputs
from gptbert.distributed.world import World
from gptbert.monitoring import training_record
from gptbert.trainer import Trainer
from tests.operations import Operations
from tests.runs import flags, write_inputs

# Triton on a GPU; its launches depend on argument shapes only
CLOSED = ("kernels::lamb_step", "kernels::span_mask")
# operations that sync, copy from the host, or have data-dependent result shapes
FORBIDDEN = {
    "from host", "aten::_local_scalar_dense", "aten::pin_memory", "aten::nonzero", "aten::nonzero_numpy",
    "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::equal", "aten::repeat_interleave.Tensor",
}  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("fixed"))


@pytest.fixture
def make_trainer(inputs, monkeypatch):
    """Makes trainers whose device has shapes but no data, so that reading a value is an error."""
    monkeypatch.setattr(training_record, "measure_matmul_flops", lambda *args, **options: 1.0)
    # PyTorch has no autocast for the meta device
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *args: False)
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: nullcontext())

    def make(**changes):
        settings = {"global_batch_size": 16, "batch_reduction": 4, "max_steps": 100, "no_compile": True}
        settings["cuda_graph"] = "on"
        config = parse(TrainConfig, flags(inputs, **settings | changes))
        world = World(0, 1, torch.device("meta"))
        trainer = Trainer(config, Inputs.open(config), HybridPlan(config, 1), world)
        trainer.step = 1
        with Operations(lambda *_: None, closed=CLOSED):
            trainer.train_step(trainer.loader.load(1))  # one-time allocations
        return trainer

    return make


def operations_of(trainer, step):
    """A step's operations with tensor shapes, dtypes and devices; and those on host tensors other than rows."""
    trainer.step = step
    rows = trainer.loader.load(step)
    loaded = {id(tensor) for _, tensors in rows for tensor in tensors.values()}
    seen, from_host = [], []

    def look(name, tensors):
        seen.append((name, tuple((tensor.shape, tensor.dtype, tensor.device.type) for tensor in tensors)))
        from_host.extend(name for tensor in tensors if tensor.device.type == "cpu" and id(tensor) not in loaded)

    with Operations(look, closed=CLOSED):
        trainer.train_step(rows)
    return seen, from_host


@pytest.mark.parametrize(
    "changes",
    [{}, {"hybrid_numerator": 0}, {"hybrid_numerator": 4}, {"mask_history": True}],
    ids=["hybrid", "causal", "masked", "history"],
)
def test_steps_of_the_same_shapes_are_the_same_operations(make_trainer, changes):
    """And a run has few shapes, whatever its schedules do."""
    trainer = make_trainer(local_batch_size=16, **changes)
    found, calls = {}, {}
    for step in range(2, 100):
        trainer.step = step
        batch = trainer.loader.batch(trainer.loader.load(step), step)
        shapes = tuple(micro_batch.shape for micro_batch in trainer.micro_batches.cut(batch, step))
        found.setdefault(shapes, []).append(step)
    assert len(found) <= 12
    first, second, *_, last = max(found.values(), key=len)
    for step in (first, second, last):
        calls[step], _ = operations_of(trainer, step)  # the first makes the tensors that graphs read
    assert len(calls[second]) > 1000
    assert calls[second] == calls[last]


def test_all_micro_batches_are_the_same_operations(make_trainer, monkeypatch):
    trainer = make_trainer(local_batch_size=4)
    forward, seen = trainer.training_step.forward, []

    def watched(*args):
        own = []
        seen.append(own)
        look = lambda name, tensors: own.append((name, tuple(tensor.shape for tensor in tensors)))  # noqa: E731
        with Operations(look, closed=CLOSED):
            return forward(*args)

    monkeypatch.setattr(trainer.training_step, "forward", watched)
    for step in (90, 99):
        trainer.step = step
        trainer.train_step(trainer.loader.load(step))
    assert len(seen) == 4 + 4
    assert len(seen[0]) > 300
    assert all(own == seen[0] for own in seen)


@pytest.mark.parametrize("mask_history", [False, True])
def test_a_cuda_graph_could_record_every_operation(make_trainer, mask_history):
    trainer = make_trainer(mask_history=mask_history)
    seen, from_host = operations_of(trainer, 50)
    assert not from_host, "a copy from memory that is not pinned"
    assert not {name for name, _ in seen} & FORBIDDEN
    copies = [name for name, tensors in seen if any(device == "cpu" for *_, device in tensors)]
    assert copies == ["aten::_to_copy"] * (8 if mask_history else 6), "the fields of both objectives' rows"


@pytest.mark.parametrize(
    "what",
    [
        lambda device: torch.tensor(1.0, device=device),
        lambda device: torch.ones(2, device=device) + torch.ones(2).to(device),
        lambda device: torch.zeros(3, device=device)[[0, 2]],
    ],
    ids=["a number", "a tensor", "a list of places"],
)
def test_what_comes_from_the_host_is_seen(make_trainer, monkeypatch, what):
    trainer = make_trainer()
    forward = trainer.training_step.forward
    monkeypatch.setattr(trainer.training_step, "forward", lambda *args: (what(trainer.world.device), forward(*args))[1])
    seen, from_host = operations_of(trainer, 50)
    assert from_host or {name for name, _ in seen} & FORBIDDEN


@pytest.mark.parametrize("what", [lambda x: x.item(), lambda x: x.nonzero(), lambda x: bool(x.isfinite())])
def test_what_waits_for_the_device_is_an_error(make_trainer, monkeypatch, what):
    trainer = make_trainer()
    forward = trainer.training_step.forward
    monkeypatch.setattr(
        trainer.training_step, "forward", lambda *args: (what(trainer.sums.sums[0, 0]), forward(*args))[1]
    )
    with pytest.raises((RuntimeError, NotImplementedError)):
        operations_of(trainer, 50)


@pytest.mark.parametrize("local_batch_size", [16, 4, 1])
def test_padding_changes_no_gradient(inputs, monkeypatch, local_batch_size):
    results = []
    for has_fixed_shapes in (False, True):
        changes = {"config_file": inputs / "no_dropout.json", "local_batch_size": local_batch_size}
        config = parse(TrainConfig, flags(inputs, global_batch_size=15, optimizer="adamw", **changes))
        trainer = Trainer(config, Inputs.open(config), HybridPlan(config, 1), World(0, 1, torch.device("cpu")))
        trainer.micro_batches.has_fixed_shapes = has_fixed_shapes
        monkeypatch.setattr(trainer.optimizer, "zero_grad", lambda: None)
        norm = trainer.train_step(trainer.loader.load(0))
        gradients = {name: param.grad for name, param in trainer.model.named_parameters()}
        results.append(gradients | {"norm": norm, "sums": trainer.sums.sums})
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-7)
