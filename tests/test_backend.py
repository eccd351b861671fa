"""Choice of the implementation: by argument, process, environment or device; and a training run's choice."""

import dataclasses
import json
import os
from contextlib import nullcontext

import pytest
import torch

from gptbert.command_line import parse
from gptbert.config import TrainConfig
from gptbert.distributed.world import World, connect
from gptbert.errors import InputError
from gptbert.train import fit
from gptbert.training import preparation
from gptbert.training.preparation import prepare_cpp_kernels, prepare_kernels
from kernels import backend, cpp
from kernels.backend import choose_backend, set_default_backend, uses_cpp
from kernels.check import Row
from kernels.lamb import cpp as cpp_lamb
from tests.runs import flags, on_ranks, read_records, write_inputs

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ALONE = World(0, 1, CPU)


def test_the_argument_comes_first_then_the_process_then_the_environment(monkeypatch):
    assert choose_backend(None, CPU) == "torch"
    monkeypatch.setenv("KERNELS_BACKEND", "cpp")
    assert choose_backend(None, CPU) == "cpp"
    set_default_backend("torch")
    assert choose_backend(None, CPU) == "torch"
    assert choose_backend("cpp", CPU) == "cpp"


def test_cpp_is_for_cpus(monkeypatch):
    with pytest.raises(ValueError, match=r"backend='cpp': C\+\+ kernels are for CPUs, .* on cuda; 'torch' works"):
        choose_backend("cpp", CUDA)
    monkeypatch.setenv("KERNELS_BACKEND", "cpp")
    with pytest.raises(ValueError, match="KERNELS_BACKEND='cpp': "):
        choose_backend(None, CUDA)


def test_an_unknown_name_is_refused_wherever_it_comes_from(monkeypatch):
    with pytest.raises(ValueError, match="backend='cuda': this version has torch, triton, cpp"):
        choose_backend("cuda", CPU)
    monkeypatch.setenv("KERNELS_BACKEND", "Torch")
    with pytest.raises(ValueError, match="KERNELS_BACKEND='Torch': this version has torch, triton, cpp"):
        choose_backend(None, CPU)


def test_without_triton_there_is_pytorch(monkeypatch):
    monkeypatch.setattr(backend, "_TRITON_IS_INSTALLED", False)
    assert choose_backend(None, CUDA) == choose_backend("torch", CUDA) == "torch"
    assert choose_backend("cpp", CPU) == "cpp"
    with pytest.raises(ValueError, match=r"backend='triton': Triton is not installed .*'torch' works"):
        choose_backend("triton", CUDA)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kernels_in_cpp_take_bf16_on_a_cpu(dtype):
    is_bf16 = dtype == torch.bfloat16
    assert uses_cpp(torch.empty(1, dtype=dtype), "cpp") == is_bf16
    assert not uses_cpp(torch.empty(1, dtype=dtype), "torch")
    assert not uses_cpp(torch.empty(1, dtype=dtype, device="meta"), "cpp")
    assert not uses_cpp(torch.empty(1, dtype=dtype))
    set_default_backend("cpp")
    assert uses_cpp(torch.empty(1, dtype=dtype)) == is_bf16


def test_the_predicate_is_read_again_by_compiled_code(fresh_compiler):
    run = torch.compile(lambda x: x + 1 if uses_cpp(x) else x - 1, backend="eager", fullgraph=True)
    zero = torch.zeros(1, dtype=torch.bfloat16)
    assert run(zero).item() == -1
    set_default_backend("cpp")
    assert run(zero).item() == 1
    set_default_backend(None)
    assert run(zero).item() == -1


@pytest.fixture
def chosen(make_config, monkeypatch):
    """Returns a function that gives the backend of a run with these settings."""

    def choose(*, is_compiled=True, world=ALONE, **settings):
        config = make_config(**settings)
        prepare_kernels(config, world)
        return prepare_cpp_kernels(config, world, is_compiled=is_compiled)

    return choose


def test_compiled_runs_on_cpus_use_cpp_unless_something_else_was_asked_for(chosen, monkeypatch):
    assert chosen() == choose_backend(None, CPU) == "cpp"
    assert chosen(is_compiled=False) == choose_backend(None, CPU) == "torch"
    assert chosen(kernels="torch") == choose_backend(None, CPU) == "torch"
    assert chosen(kernels="cpp", is_compiled=False) == choose_backend(None, CPU) == "cpp"
    monkeypatch.setenv("KERNELS_BACKEND", "torch")
    assert chosen() == choose_backend(None, CPU) == "torch"


def test_on_other_devices_cpp_is_never_chosen_and_cannot_be(chosen):
    world = World(0, 1, torch.device("mps"))
    assert chosen(world=world) == "torch"
    with pytest.raises(InputError, match=r"^--kernels cpp: .*C\+\+ kernels are for CPUs"):
        chosen(world=world, kernels="cpp")


def test_without_a_compiler_a_run_does_without_and_says_so(chosen, monkeypatch, capsys):
    monkeypatch.setattr(cpp, "unavailable", lambda: "there is no g++")
    assert chosen() == choose_backend(None, CPU) == "torch"
    assert "kernels in C++ cannot be compiled here (there is no g++)" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"^--kernels cpp: .*there is no g\+\+.*--kernels torch works"):
        chosen(kernels="cpp")
    monkeypatch.setenv("KERNELS_BACKEND", "cpp")
    with pytest.raises(InputError, match=r"^KERNELS_BACKEND=cpp: .*there is no g\+\+.*--kernels torch works"):
        chosen()


def test_all_ranks_use_the_same(chosen, monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Two(World):
        def all_gather(self, value):
            return [value, "there is no g++"]

        def errors_on_all_ranks(self):
            return nullcontext()

    assert chosen(world=Two(0, 2, CPU)) == "torch"


def _choose_on_a_rank(rank, config, results):
    if rank == 1:
        os.environ["KERNELS_BACKEND"] = "torch"
    with connect(config) as world:
        prepare_kernels(config, world)
        backend = prepare_cpp_kernels(config, world, is_compiled=True)
        results.put((rank, (backend, world.on_main(lambda: "both go on"))))


def test_hosts_with_other_environments_do_not_wait_for_each_other(make_config):
    config = make_config(device="cpu", cpu_threads=1, kernel_check="off", timeout=10)
    assert on_ranks(2, _choose_on_a_rank, config) == {0: ("cpp", "both go on"), 1: ("torch", "both go on")}


def test_a_kernel_that_differs_from_its_reference_stops_the_run(chosen, monkeypatch):
    wrong = [Row("gated_norm", "D=3: ∂gate", 2.0, 1.0, 0.1)]
    monkeypatch.setattr(preparation, "run_checks", lambda device, backend: wrong if backend == "cpp" else [])
    with pytest.raises(InputError, match=r"kernel check failed: gated_norm, D=3: ∂gate.*--kernels torch"):
        chosen()
    assert chosen(kernel_check="off") == "cpp"


@pytest.mark.usefixtures("bf16_everywhere")
@pytest.mark.parametrize("mixed_precision", [False, True])
def test_a_run_that_is_not_compiled_can_use_cpp(tmp_path, monkeypatch, mixed_precision):
    """Losses are close to those with torch, LAMB uses the kernel, and the run's files name the backend."""
    taken, own = [], cpp_lamb.lamb_step
    monkeypatch.setattr(cpp_lamb, "lamb_step", lambda *args, **settings: taken.append(1) or own(*args, **settings))
    inputs, losses = write_inputs(tmp_path), {}
    for kernels in ("torch", "cpp"):
        settings = {"mixed_precision": mixed_precision, "max_steps": 4, "log_every": 1, "validation_steps": 1}
        settings["kernel_check"] = "off"  # the check would count as steps
        fit(parse(TrainConfig, flags(inputs, name=kernels, kernels=kernels, no_compile=True, **settings)))
        folder = inputs / "runs" / kernels
        assert json.loads((folder / "config.json").read_text())["kernels"] == kernels
        records = read_records(folder / "metrics.jsonl")
        losses[kernels] = torch.tensor([record["train/loss"] for record in records if "train/loss" in record])
        assert len(taken) == (4 if kernels == "cpp" else 0)
    torch.testing.assert_close(*losses.values(), rtol=1e-2 if mixed_precision else 1e-5, atol=0)
