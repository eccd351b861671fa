"""Host work in a step on the device: no device sync, and nothing that prevents capture in a CUDA graph.

The rehearsal on the CPU leaves out only `no_waiting` and `recorded`.
"""

from contextlib import contextmanager

import pytest
import torch

from gptbert import schedules
from gptbert.command_line import parse
from gptbert.config import TrainConfig
from gptbert.data.hybrid_plan import HybridPlan
from gptbert.data.inputs import Inputs
from gptbert.distributed.world import World
from gptbert.optim import update_weights
from gptbert.trainer import Trainer
from tests.gpu.compiled_run import always_compile
from tests.runs import flags

WARM_UPS = 3


@contextmanager
def no_waiting(device):
    """Context manager: a device sync is an error."""
    if device.type == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def recorded(function, device):
    """Run a function WARM_UPS times, then capture it in a CUDA graph without running it; returns the graph's replay."""
    if device.type == "cpu":
        for _ in range(WARM_UPS):
            function()
        return function
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def make_trainer(inputs, device, **changes):
    settings = {"device": device.type, "mixed_precision": True, "no_compile": True, "kernel_check": "off"}
    sizes = {"seq_length": 16, "global_batch_size": 8, "local_batch_size": 4}
    config = parse(TrainConfig, flags(inputs, **settings | sizes | changes))
    trainer = Trainer(config, Inputs.open(config), HybridPlan(config, 1), World(0, 1, torch.device(device.type, 0)))
    trainer.micro_batches.has_fixed_shapes = True  # as on a GPU, so that the rehearsal has them too
    return trainer


@pytest.mark.parametrize(
    ("optimizer", "more"),
    [("lamb", {}), ("lamb", {"mask_history": True}), ("adamw", {"activation_checkpointing": True}), ("muon", {})],
)
def test_a_step_waits_for_nothing(inputs, device, optimizer, more):
    """From rows on the host to updated weights; the first two steps may sync, since they compile and allocate."""
    trainer = make_trainer(inputs, device, optimizer=optimizer, **more)
    rows = [trainer.loader.load(step) for step in range(4)]
    for step in range(2):
        trainer.train_step(rows[step])
    with no_waiting(device):
        for step in range(2, 4):
            norm = trainer.train_step(rows[step])
    assert norm.isfinite()
    assert trainer.skipped_steps.total() == 0


def test_waiting_is_an_error_where_it_is_looked_for(device):
    if device.type == "cpu":
        pytest.skip("there is nothing to wait for on a CPU")
    with pytest.raises(RuntimeError, match="synchroniz"), no_waiting(device):
        torch.ones((), device=device).item()


def fixed_step(trainer, device):
    """A step on the same rows each time: a function without arguments, and the tensor that receives the loss.

    All of a step's work on the device except masking: forward and backward of each micro-batch, clipping, the
    optimizer, the EMA. The learning rate is the first step's, in a tensor.
    """
    batch = trainer.loader.batch(trainer.loader.load(0), 0)
    micro_batches, scales = trainer.micro_batches.cut(batch, 0), trainer._loss_scales(batch)[0]
    loss = torch.zeros((), device=device)
    rate = torch.tensor(schedules.learning_rate(trainer.config, 1), dtype=torch.float32, device=device)
    for group in trainer.optimizer.param_groups:
        group["lr"] = rate
    for param in trainer.model.parameters():
        param.grad = torch.zeros_like(param)

    def step():
        for param in trainer.model.parameters():
            param.grad.zero_()
        loss.zero_()
        for micro_batch in micro_batches:
            total = trainer._forward(micro_batch, scales).total
            total.backward()
            loss.add_(total.detach())
        update_weights(trainer.optimizer, trainer.model, trainer.ema, trainer.config.max_gradient)

    return step, loss


@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_in_a_cuda_graph_is_the_step(inputs, device, compiled, fresh_compiler, monkeypatch):
    """Without dropout, so that losses agree: the same number of eager steps and of replays."""
    if compiled:
        always_compile(monkeypatch)
    ends = []
    for replayed in (False, True):
        trainer = make_trainer(inputs, device, config_file=inputs / "no_dropout.json", no_compile=not compiled)
        assert trainer.is_compiled is compiled
        step, loss = fixed_step(trainer, device)
        repeat = recorded(step, device) if replayed else step
        losses = []
        for _ in range(4 if replayed else 4 + WARM_UPS):
            repeat()
            losses.append(loss.clone())
        ends.append([torch.stack(losses[-4:]), *trainer.model.parameters(), *trainer.ema.model.parameters()])
    assert ends[1][0][0] > ends[1][0][-1], "the loss falls from replay to replay"
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one.detach(), other.detach(), rtol=1e-3, atol=1e-5)
