"""Apple's MPS, as far as a machine without one can test it: the choice of it, and that a run asks for what it has."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch

from gptbert import optim
from gptbert.command_line import parse
from gptbert.config import TrainConfig
from gptbert.data.hybrid_plan import HybridPlan
from gptbert.data.inputs import Inputs
from gptbert.distributed.hardware import hardware_name, has_bf16, synchronize
from gptbert.distributed.memory import peak_memory
from gptbert.distributed.random_state import RandomState
from gptbert.distributed.world import World, choose_device, connect
from gptbert.errors import InputError
from gptbert.fill_mask import fill_masks
from gptbert.generate import continue_text
from gptbert.model.objective import Objective
from gptbert.monitoring import metrics
from gptbert.monitoring.metrics import Throughput
from gptbert.monitoring.samples import Samples
from gptbert.scoring.likelihood import log_likelihoods
from gptbert.text.tokenizer import load_tokenizer
from gptbert.trainer import Trainer
from gptbert.training import compile_choice, preparation
from kernels.backend import choose_backend, widest_float
from kernels.lamb import eager, reference
from tests.mps_walk import MpsWalk, is_on_mps, to_host
from tests.runs import flags, write_inputs

MPS, CPU = torch.device("mps"), torch.device("cpu")


@pytest.fixture
def mps(monkeypatch):
    """Torch sees one."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("mps"), train_characters=10_000)


@pytest.mark.usefixtures("mps")
def test_the_device_of_a_process(monkeypatch):
    assert choose_device("auto") == choose_device("mps") == MPS
    assert choose_device("cpu") == choose_device("auto", 1, 2) == CPU, "several processes do without"
    with pytest.raises(
        InputError, match=r"^--device mps: is for one process, not 2, since .*; start one without torchrun"
    ):
        choose_device("mps", 0, 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_device("auto") == torch.device("cuda", 0)
    assert choose_device("mps") == MPS


@pytest.mark.parametrize(("is_built", "why"), [(False, "built without it"), (True, "takes an Apple GPU")])
def test_without_one_a_line_says_why(monkeypatch, is_built, why):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: is_built)
    with pytest.raises(InputError, match=rf"--device mps: torch sees none \(.*{why}\); --device cpu works everywhere"):
        choose_device("mps")
    assert choose_device("auto").type != "mps"


@pytest.mark.usefixtures("mps")
@pytest.mark.parametrize(
    ("variables", "settings", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, {}, "--device mps: is for one"),
        ({}, {"optimizer": "muon"}, "--optimizer muon: multiplies in bf16"),
    ],
)
def test_what_it_is_not_for_is_one_line(make_config, monkeypatch, variables, settings, message):
    for name, value in (variables | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message), connect(make_config(device="mps", **settings)):
        pytest.fail("connected")


def test_what_is_chosen_for_it(make_config, monkeypatch, capfd):
    assert choose_backend(None, MPS) == "torch"
    for backend in ("triton", "cpp"):
        with pytest.raises(ValueError, match=r"'torch' works"):
            choose_backend(backend, MPS)
    assert not has_bf16(MPS), "nothing is known"
    assert widest_float(MPS) == torch.float32
    assert widest_float(CPU) == torch.float64
    monkeypatch.setattr(torch.mps, "synchronize", lambda: print("waited"))
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 5)
    synchronize(MPS)
    assert capfd.readouterr().out == "waited\n"
    assert peak_memory(MPS) == 5
    assert hardware_name(MPS).startswith("Apple's MPS (")
    config, world = make_config(mixed_precision=True), World(0, 1, MPS)
    assert preparation.with_fast_precision(config, world).mixed_precision is False
    assert "computing in fp32, since bf16 has not been tried on Apple's MPS" in capfd.readouterr().err
    choice = compile_choice.choose(config, None, None, world)
    assert not choice.is_compiled
    preparation.log_choices(config, world, choice)
    said = capfd.readouterr().err
    assert "not compiled: compiled code has not been tried on Apple's MPS" in said
    assert "has not been run yet: compare its first losses with --device cpu" in said
    state = RandomState(3, world)
    state.start()
    states = [state.state_dict()]
    assert set(states[0]["random"]) == {"cpu"}, "all random numbers are the CPU's"
    drawn = torch.rand(3)
    state.load_rank_states(states, 4)
    assert torch.equal(torch.rand(3), drawn)
    assert not make_config().records_steps("mps")


def as_on_mps(monkeypatch):
    """Let a run on the CPU take the ways that it takes on MPS."""
    for module in (metrics, reference):
        monkeypatch.setattr(module, "widest_float", lambda device: widest_float(MPS))
    monkeypatch.setattr(eager, "supports", lambda *_: False)  # LAMB's code for CPUs
    plain = partial(optim.AdamW, fused=False)
    monkeypatch.setattr(optim, "AdamW", lambda groups, fused, **settings: plain(groups, **settings))
    monkeypatch.setattr(torch.Tensor, "cpu", to_host)


def trainer(inputs, **changes):
    config = parse(TrainConfig, flags(inputs, no_compile=True, max_steps=4, cuda_graph="off", **changes))
    made = Trainer(config, Inputs.open(config), HybridPlan(config, 1), World(0, 1, CPU), is_compiled=False)
    made.micro_batches.has_fixed_shapes = True
    return made


@pytest.mark.parametrize("optimizer", ["lamb", "adamw"])
def test_a_run_asks_for_what_mps_has(inputs, monkeypatch, optimizer):
    as_on_mps(monkeypatch)
    run = trainer(inputs, optimizer=optimizer, mask_history=True)
    rows = [run.loader.load(step) for step in range(2)]
    samples = Samples(run.config, run.inputs.valid_store, run.world)
    walk = MpsWalk()
    with walk:
        for each in rows:
            norm = run.train_step(each)
        run.training_record(norm, Throughput(0))
        run.validation_record()
        samples(run.model, nullcontext())
        run._agree_to_save()
        run.sums.state_dict()
    assert len(walk.names) > 80, "or it has seen little"
    assert walk.wide == set()
    of_the_cpu = {"2.11": {"_assert_async.msg", "nonzero_static"}, "2.12": {"_assert_async.msg"}}
    missing = {name for name in walk.names if not is_on_mps(name)}
    assert missing == of_the_cpu.get(torch.__version__[:4], set())


def test_commands_ask_for_what_mps_has(inputs, monkeypatch):
    model, tokenizer = trainer(inputs).model.eval(), load_tokenizer(inputs / "tokenizer.json")
    monkeypatch.setattr(torch.Tensor, "cpu", to_host)
    walk = MpsWalk(has_factories=True)
    with walk, torch.no_grad():
        for objective in Objective:
            log_likelihoods(model, [[1, 9, 8], [1, 7]], objective)
    with walk, torch.no_grad():
        fill_masks(model, tokenizer, "a<mask>b", 3)
        continue_text(model, tokenizer, "a", 2, 1.0, 4, 0.9, 0)
    assert walk.wide == set()
    assert {name for name in walk.names if not is_on_mps(name)} == set()


def test_the_walk_sees_what_mps_lacks():
    walk = MpsWalk()
    with walk:
        torch.ones(3).double()
        torch.linalg.eigvals(torch.eye(2))
    assert walk.wide == {"aten::_to_copy"}
    assert not all(map(is_on_mps, walk.names))


@pytest.mark.parametrize("is_finite", [True, False])
def test_a_step_that_is_not_finite_is_skipped_by_a_plain_adamw_too(inputs, monkeypatch, is_finite):
    as_on_mps(monkeypatch)
    run = trainer(inputs, optimizer="adamw")
    before = [param.detach().clone() for param in run.model.parameters()]
    for param in run.model.parameters():
        param.grad = torch.full_like(param, 0.1 if is_finite else torch.nan)
    optim.update_weights(run.optimizer, run.model, run.ema, 1.0)
    is_same = all(torch.equal(param, old) for param, old in zip(run.model.parameters(), before, strict=True))
    assert is_same is not is_finite
    assert bool(run.optimizer.state) is is_finite
