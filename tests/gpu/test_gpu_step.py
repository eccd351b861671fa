"""Host work in a step on the device: no device sync, and nothing that prevents capture in a CUDA graph.

The rehearsal on the CPU leaves out only `no_waiting` and the recording.
"""

import json
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch

from gptbert.command_line import parse
from gptbert.config import TrainConfig
from gptbert.data.hybrid_plan import HybridPlan
from gptbert.data.inputs import Inputs
from gptbert.distributed.world import World
from gptbert.trainer import Trainer
from gptbert.training.cuda_graph import Recorder
from kernels import wanted
from tests.gpu.compiled_run import always_compile
from tests.runs import MODEL, ROOT, flags


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


def make_trainer(inputs, device, **changes):
    settings = {"device": device.type, "mixed_precision": True, "no_compile": True, "kernel_check": "off"}
    sizes = {"seq_length": 16, "global_batch_size": 8, "local_batch_size": 4, "batch_reduction": 1}
    wide = inputs / "wide.json"  # wide enough for all fused operations, where a test wants them
    wide.write_text(json.dumps(MODEL | {"hidden_size": 64}))
    config = parse(TrainConfig, flags(inputs, config_file=wide, **settings | sizes | changes))
    trainer = Trainer(config, Inputs.open(config), HybridPlan(config, 1), World(0, 1, torch.device(device.type, 0)))
    trainer.micro_batches.has_fixed_shapes = True  # as on a GPU, so that the rehearsal has them too
    return trainer


@pytest.mark.parametrize("mode", ["on", "off"])
@pytest.mark.parametrize(
    ("optimizer", "more"),
    [("lamb", {}), ("lamb", {"mask_history": True}), ("adamw", {"activation_checkpointing": True}), ("muon", {})],
)
@pytest.mark.parametrize("operations", [(), wanted.FUSED], ids=["not fused", "fused"])
def test_a_step_waits_for_nothing(inputs, device, optimizer, more, mode, operations):
    """From rows on the host to updated weights; the first two steps may sync: they compile, allocate and record."""
    wanted.use_fused(operations)
    trainer = make_trainer(inputs, device, optimizer=optimizer, cuda_graph=mode, **more)
    rows = [trainer.loader.load(step) for step in range(4)]
    for step in range(2):
        trainer.train_step(rows[step])
    with no_waiting(device):
        for step in range(2, 4):
            norm = trainer.train_step(rows[step])
    assert norm.isfinite()
    assert trainer.skipped_steps.total() == 0


def test_after_a_failed_recording_the_process_goes_on(device):
    """In a process of its own, whose random numbers and memory would be the failed recording's for good."""
    if device.type == "cpu":
        pytest.skip("nothing is recorded on a CPU")
    code = "from tests.gpu.test_gpu_step import fail_and_go_on; fail_and_go_on()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def fail_and_go_on():
    device = torch.device("cuda", 0)
    recorder, number = Recorder(device), torch.ones((), device=device)
    recorder.run(number.item)
    assert recorder.record(number.item, "a read") is None
    assert not recorder.is_on
    torch.cuda.manual_seed(0)
    first = torch.randint(1000, (9,), device=device)
    torch.cuda.manual_seed(0)
    assert torch.equal(torch.randint(1000, (9,), device=device), first)
    torch.cuda.empty_cache()
    again = Recorder(device)
    again.run(lambda: number.add_(1))
    again.record(lambda: number.add_(1), "an addition")()
    assert number.item() == 3


def test_waiting_is_an_error_where_it_is_looked_for(device):
    if device.type == "cpu":
        pytest.skip("there is nothing to wait for on a CPU")
    with pytest.raises(RuntimeError, match="synchroniz"), no_waiting(device):
        torch.ones((), device=device).item()


@pytest.mark.parametrize(
    ("optimizer", "compiled", "operations"),
    [
        *(("lamb", False, ()), ("adamw", False, ()), ("muon", False, ()), ("lamb", True, ())),
        *(("lamb", False, wanted.FUSED), ("lamb", True, wanted.FUSED)),
    ],
)
def test_recorded_steps_have_the_bits_of_eager_ones(
    inputs, device, optimizer, compiled, operations, fresh_compiler, monkeypatch
):
    """With dropout, over two row lengths; the rehearsal records nothing (tests/test_recorded_step.py emulates it)."""
    if device.type == "cpu" and compiled and operations:
        pytest.skip("the rehearsal fuses nothing, so this would trace what the case without fusing has traced")
    wanted.use_fused(operations)
    if compiled:
        always_compile(monkeypatch)
    ends = []
    for mode in ("on", "off"):
        settings = {"seq_length_growth": True, "max_steps": 10, "no_compile": not compiled, "cuda_graph": mode}
        trainer = make_trainer(inputs, device, optimizer=optimizer, **settings)
        assert trainer.is_compiled is compiled
        norms = []
        for trainer.step in (2, 3, 4, 7, 8):
            norms.append(trainer.train_step(trainer.loader.load(trainer.step)))
        ends.append(
            [torch.stack(norms), trainer.sums.sums, *trainer.model.parameters(), *trainer.ema.model.parameters()]
        )
        if mode == "on" and device.type == "cuda":
            recorder = trainer.training_step.recorder
            assert recorder.is_on, "no recording failed"
            assert len(recorder.recorded) >= 2
    assert ends[0][0].isfinite().all()
    for one, other in zip(*ends, strict=True):
        assert torch.equal(one.detach(), other.detach())
