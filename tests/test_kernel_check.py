"""The check before a run, in its own process: any failure becomes one line, and the run does not start."""

import dataclasses
import os
import re
import signal
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch

from gptbert.command_line import parse, run_command
from gptbert.config import ModelConfig, TrainConfig
from gptbert.data.hybrid_plan import HybridPlan
from gptbert.distributed.stop_signal import SIGNALS
from gptbert.distributed.world import World, connect
from gptbert.errors import InputError
from gptbert.monitoring import display
from gptbert.train import fit
from gptbert.training import kernel_check as module
from gptbert.training.kernel_check import kernel_check, kernel_settings
from kernels import wanted
from kernels.attention_context.fused import distance_tables
from kernels.backend import set_default_backend
from kernels.run import Run
from tests.runs import MODEL, flags, on_ranks, write_inputs

SMALL = Run("float32", 40, (9,), 9, mask_history=False, lamb=True, buckets=False)
WITH_ATTENTION = dataclasses.replace(SMALL, row_lengths=(17,), validation_length=17, lamb=False, attention=(1, 32, 16))
ALONE = World(0, 1, torch.device("cpu"))
PLANTS = {  # executed by Python before the check's own module
    "wrong": "import kernels.lamb.kernel as kernel\nkernel._log = lambda beta: -1.0\n",
    "wrong attention": (
        "import kernels.attention_context.kernel as kernel\nkernel.LOG2_E = kernel.tl.constexpr(1.0)\n"
    ),
    "wrong gather": (
        "import kernels.attention_context.kernel as kernel\n"
        "own = kernel.forward\n"
        "kernel.forward = lambda q, k, v, position, buckets, variant, *rest: own(\n"
        "    q, k, v, position * (1.0 + (variant == 'gather')), buckets, variant, *rest\n"
        ")\n"
    ),
    "wrong mixes": "import kernels.depth_mix.kernel as kernel\nkernel.keep_arguments = lambda *_: (0, 1.0)\n",
    "crash": "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n",
    "abort": "import os\nos.abort()\n",
    "hang": "import time\ntime.sleep(600)\n",
    "exception": "import tyro\ntyro.cli = lambda *_, **__: 1 / 0\n",
    "silence": "import os\nos._exit(3)\n",
}


@pytest.fixture
def plant(monkeypatch, tmp_path):
    """Returns a function that injects code at the start of the check's process, and of no other Python process."""

    def plant(name):
        lines = "".join(f"    {line}\n" for line in PLANTS[name].splitlines())
        (tmp_path / "sitecustomize.py").write_text(f"import sys\nif 'kernels.check' in sys.orig_argv:\n{lines}")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return plant


def finish(run=SMALL, timeout=600):
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    with kernel_check(run, device, timeout) as finish_check:
        return finish_check()


def test_right_kernels_pass(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    finish()


def test_fused_operations_that_fail_are_done_without(plant, capfd):
    """Either of two groups, of which the other passes."""
    run = dataclasses.replace(WITH_ATTENTION, mixes=(8, 2))
    plant("wrong attention")
    reasons = finish(run)
    assert reasons.keys() == {("attention_context", "gather"), ("attention_context", "load")}
    for reason in reasons.values():
        assert re.match("kernel check failed: attention_context, fused .*: error [^;]*$", reason)
    wanted.use_fused(wanted.FUSED)
    module.agree_on_fused(reasons, ALONE)
    assert [wanted.is_wanted(op) for op in ("attention_context", "depth_mix")] == [False, True]
    said = capfd.readouterr().err.splitlines()
    for line, variant in zip(said, ("gather", "load"), strict=True):
        assert line.startswith(
            f"attention_context in its variant {variant} is not fused in this run: kernel check fail"
        )
    plant("wrong mixes")
    assert finish(run).keys() == {("depth_mix", None)}


def test_another_variant_takes_the_place_of_one_that_fails(plant, capfd, make_config):
    plant("wrong gather")
    failures = finish(WITH_ATTENTION)
    assert failures.keys() == {("attention_context", "gather")}
    wanted.use_fused(wanted.FUSED)
    assert wanted.variant("attention_context") == "gather"
    module.agree_on_fused(failures, ALONE)
    assert all(map(wanted.is_wanted, wanted.FUSED))
    assert wanted.variant("attention_context") == "load"
    tables = distance_tables(torch.zeros(31, dtype=torch.int64), 16, torch.float32)
    assert tables.variant == "load", "the model asks for these tables"
    assert "attention_context (load), gated_norm" in display._ways(make_config(), ALONE)
    assert capfd.readouterr().err.startswith("attention_context in its variant gather is not fused in this run: ")


def _fused_where_ranks_want(rank, operations, arguments, results):
    with connect(parse(TrainConfig, arguments)) as world:
        set_default_backend("triton")
        wanted.use_fused(operations[rank])
        module.use_right_assembler = lambda: "12.8"
        said = []
        module.log = said.append
        module.agree_on_fused({}, world)
        results.put((rank, ([op for op in wanted.FUSED if wanted.is_wanted(op)], said)))


@pytest.mark.parametrize(
    ("operations", "common", "line"),
    [
        ([wanted.FUSED, ()], [], "does without (its ptxas 12.8 is known to make wrong code of matrix products): "),
        ([(), wanted.FUSED], [], None),  # rank 0 has said so itself
        ([wanted.FUSED, ["dropout", "depth_mix"]], ["dropout", "depth_mix"], "does without: attention_context, gated"),
    ],
)
def test_all_ranks_fuse_what_each_of_them_wants(inputs, operations, common, line):
    """Else they sum gradients of different parameters."""
    said = on_ranks(2, _fused_where_ranks_want, operations, flags(inputs))
    assert said[0][0] == said[1][0] == common
    assert len(said[0][1]) == bool(line)
    assert not line or said[0][1][0].startswith(f"not fused in this run, as rank 1 {line}")
    assert said[1][1] == []


def test_a_variant_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="attention_context has no variant gather2; there are gather, load"):
        wanted.use_fused(wanted.FUSED, {"attention_context": "gather2"})
    with pytest.raises(ValueError, match="depth_mix has no variant load; there are none"):
        wanted.use_fused(wanted.FUSED, {"depth_mix": "load"})


def test_without_kernels_of_tritons_there_is_no_process(monkeypatch):
    monkeypatch.setattr(module.subprocess, "Popen", None)
    finish(None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wrong", r"^kernel check failed: lamb, fp32: params: error .*; --kernels torch, or KERNELS_BACKEND=torch"),
        ("crash", r"^kernel check failed: a kernel ended the process of the check \(SIGSEGV\); --kernels torch"),
        ("abort", r"^kernel check failed: a kernel ended the process of the check \(SIGABRT\); --kernels torch"),
        ("exception", "^kernel check failed: ZeroDivisionError: division by zero; --kernels torch"),
        ("silence", "^kernel check failed: exit status 3; --kernels torch"),
    ],
)
def test_what_goes_wrong_in_the_process_is_one_line(plant, name, message):
    plant(name)
    with pytest.raises(InputError, match=message):
        finish()


def test_a_check_that_hangs_ends_with_its_time(plant, monkeypatch):
    plant("hang")
    monkeypatch.setattr(module, "SECONDS", 0.3)
    started = []
    own = module.subprocess.Popen
    monkeypatch.setattr(module.subprocess, "Popen", lambda *a, **k: started.append(own(*a, **k)) or started[-1])
    with pytest.raises(InputError, match=r"^kernel check failed: it had no result after 0.2 seconds; --kernels torch"):
        finish()
    assert started[0].returncode == -9, "nothing is left behind"


@pytest.mark.parametrize(("timeout", "most"), [(600, 300), (200, 100), (5, 60)])
def test_a_rank_whose_fused_kernels_hang_is_back_before_the_others_give_up(monkeypatch, timeout, most):
    clock, start = [1000.0], 1000.0

    class Process:
        def __init__(self, command, **_):
            self.hangs = not {"span_mask", "lamb"} & {*command}

        def wait(self, seconds=None):
            if not self.hangs or seconds is None:
                return 0
            clock[0] += seconds
            raise subprocess.TimeoutExpired("check", seconds)

        def kill(self):
            pass

    monkeypatch.setattr(module.subprocess, "Popen", Process)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    failures = finish(dataclasses.replace(WITH_ATTENTION, gates=(8, 8), mixes=(8, 2)), timeout)
    attention = {("attention_context", "gather"), ("attention_context", "load")}
    assert failures.keys() == attention | {("gated_norm", None), ("depth_mix", None)}
    assert clock[0] - start == most
    assert f"no result after {most / 3:.3g} seconds" in failures["attention_context", "load"], "it had its time too"


def test_a_run_that_ends_before_takes_its_check_along(plant, monkeypatch):
    plant("hang")
    start = time.monotonic()
    with pytest.raises(KeyError), kernel_check(SMALL, torch.device("cpu"), 600):
        raise KeyError
    assert time.monotonic() - start < 300, "it did not wait for it"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize(
    ("kernels", "check", "stops"), [("triton", "on", True), ("triton", "off", False), ("torch", "on", False)]
)
def test_kernels_that_fail_their_check_stop_the_run_before_it_starts(inputs, plant, kernels, check, stops):
    plant("crash")
    name = f"check_{kernels}_{check}"
    small = {"max_steps": 1, "seq_length": 16, "batch_reduction": 1, "validation_steps": 1}
    small |= {"global_batch_size": 2, "local_batch_size": 2}
    config = parse(TrainConfig, flags(inputs, name=name, kernels=kernels, kernel_check=check, **small))
    if not stops:
        fit(config)
        return
    with pytest.raises(InputError, match=r"kernel check failed: .*SIGSEGV.*--kernels torch"):
        fit(config)
    assert not (inputs / "runs" / name).exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_in_the_check_ends_the_run_and_the_check(inputs, plant, monkeypatch, capfd, number):
    plant("hang")
    started, handlers = [], {each: signal.getsignal(each) for each in SIGNALS}
    own = module.subprocess.Popen
    monkeypatch.setattr(module.subprocess, "Popen", lambda *a, **k: started.append(own(*a, **k)) or started[-1])
    monkeypatch.setattr(module, "_finish", lambda *_: os.kill(os.getpid(), number) or pytest.fail("went on"))
    try:
        with pytest.raises(SystemExit) as end:
            run_command(TrainConfig, fit, flags(inputs, name="signalled", kernels="triton", max_steps=1))
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)
    assert end.value.code == 130
    assert capfd.readouterr().err.splitlines()[-1] == "error: interrupted"
    assert {process.returncode for process in started} == {-9}, "no check is left behind"
    assert not (inputs / "runs" / "signalled").exists()


def test_what_is_checked_is_what_the_run_does(make_config):
    config = make_config(mixed_precision=True, seq_length=64, seq_length_growth=True, mask_history=True, max_steps=100)
    model, device = ModelConfig(**MODEL), torch.device("cpu")
    run = kernel_settings(config, model, HybridPlan(config, 1), World(0, 1, device))
    assert run == Run("bfloat16", 320, (65, 129, 257), 65, mask_history=True, lamb=True, buckets=False)
    config = make_config(mixed_precision=False, seq_length=64, optimizer="adamw", max_steps=100)
    run = kernel_settings(config, model, HybridPlan(config, 2), World(1, 2, device))
    assert run == Run("float32", 320, (65,), 65, mask_history=False, lamb=False, buckets=True)


@pytest.mark.parametrize(
    ("hidden_size", "intermediate_size", "gates"),
    [(4096, 8192, (4096, 8192)), (4096, 10922, (4096, None)), (8200, 8192, (None, 8192)), (8200, 10922, None)],
)
def test_of_two_gated_norms_the_one_that_is_fused_is_checked(make_config, hidden_size, intermediate_size, gates):
    """The kernels have whole rows of at most 8,192 elements."""
    set_default_backend("triton")
    wanted.use_fused(["gated_norm"])
    model = ModelConfig(**MODEL | {"hidden_size": hidden_size, "intermediate_size": intermediate_size})
    config = make_config(mixed_precision=False, max_steps=100)
    run = kernel_settings(config, model, HybridPlan(config, 1), ALONE)
    assert run.gates == gates
    assert ("gated_norm" in run.operations) == (gates is not None)
