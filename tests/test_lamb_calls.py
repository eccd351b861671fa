"""The optimizer's prepared steps: rebuilt after any change, with copies that follow the weights."""

import pytest
import torch

from gptbert.optim import Lamb, WeightAverage
from kernels import lamb_step
from tests.numerics import same
from tests.test_lamb_prepared import TYPES, copy_all, have_the_same_bits, lay_out


@pytest.fixture
def triton(monkeypatch):
    monkeypatch.setenv("KERNELS_BACKEND", "triton")


@pytest.fixture
def preparations(monkeypatch):
    """One entry for each time that the optimizer rebuilds its calls."""
    made, own = [], Lamb._make_calls
    monkeypatch.setattr(Lamb, "_make_calls", lambda self, *args: made.append(1) or own(self, *args))
    return made


def make_module(device, seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(7, 9), torch.nn.LayerNorm(9), torch.nn.Linear(9, 5)).to(device)


def make_optimizer(module):
    params = list(module.parameters())
    return Lamb([{"params": params[::2], "weight_decay": 0.1}, {"params": params[1::2]}], lr=0.1, betas=(0.9, 0.98))


def set_gradients(module, step, without=()):
    generator = torch.Generator().manual_seed(step)
    for index, param in enumerate(module.parameters()):
        grad = torch.randn(param.shape, generator=generator).to(param.device)
        param.grad = None if index in without else grad


def exchange_state(optimizer, module):
    state = optimizer.state[next(module.parameters())]
    state["exp_avg"] = 2 * state["exp_avg"]


CHANGES = {
    "nothing": (lambda optimizer, module: None, 1),
    "the learning rate": (lambda optimizer, module: [group.update(lr=0.3) for group in optimizer.param_groups], 1),
    "betas": (lambda optimizer, module: [group.update(betas=(0.5, 0.6)) for group in optimizer.param_groups], 1),
    "one group's learning rate": (lambda optimizer, module: optimizer.param_groups[1].update(lr=0.3), 2),
    "a weight decay": (lambda optimizer, module: optimizer.param_groups[1].update(weight_decay=0.5), 2),
    "the state": (lambda optimizer, module: optimizer.load_state_dict(optimizer.state_dict()), 2),
    "a state's tensor": (exchange_state, 2),
    "no gradient": (lambda optimizer, module: setattr(module[0].bias, "grad", None), 2),
    "the memory of a parameter": (lambda _, module: setattr(module[0].bias, "data", module[0].bias.data + 1), 1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_optimizer_notices_what_changes_between_steps(device, triton, preparations, change):
    """Its steps must equal those of an optimizer that inspects everything at each step."""
    modules = [make_module(device) for _ in "ab"]
    optimizers, averages = [make_optimizer(module) for module in modules], [WeightAverage(m, 0.9) for m in modules]
    for step in range(4):
        for index, (module, optimizer, average) in enumerate(zip(modules, optimizers, averages, strict=True)):
            set_gradients(module, step)
            if step == 2:
                CHANGES[change][0](optimizer, module)
            if index:
                optimizer._forget_calls()
            optimizer.clip_step_average(1.0, average.by_parameter(module), average.decay)
    assert same(*(module.parameters() for module in modules))
    assert same(*(average.model.parameters() for average in averages))
    assert same(*([t for s in o.state.values() for t in s.values()] for o in optimizers))
    ours = len(preparations) - 4
    assert ours == CHANGES[change][1] + (change == "no gradient"), "once more where the gradient comes back"


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("rates", [1, 2])
def test_copies_of_some_parameters_follow_them(device, monkeypatch, backend, rates):
    """On both backends, in one call and two, over a skipped step, a missing gradient, restored state and new copies."""
    monkeypatch.setenv("KERNELS_BACKEND", backend)
    module, uncopied = (make_module(device) for _ in "ab")
    modules = (module, uncopied)
    optimizers, averages = [make_optimizer(each) for each in modules], [WeightAverage(each, 0.9) for each in modules]
    params = [param for name, param in module.named_parameters() if name != "2.weight"]
    for step in range(7):
        if step in {0, 5}:
            memory, places = lay_out(params, TYPES[step > 0], offset=step % 2)
            expected, expected_places = lay_out(params, TYPES[step > 0], offset=step % 2)
            copy_all([*places, *expected_places], [param.detach() for param in [*params, *params]])
        for each, optimizer, average in zip(modules, optimizers, averages, strict=True):
            set_gradients(each, step, without=(1,) if step == 3 else ())
            optimizer.param_groups[1]["lr"] = 0.1 if rates == 1 else 0.3
            if step == 2:
                each[0].weight.grad[0, 0] = torch.inf
            if step == 4:
                optimizer.load_state_dict(optimizer.state_dict())
            copies = dict(zip(params, places, strict=True)) if each is module else None
            optimizer.clip_step_average(1.0, average.by_parameter(each), 0.9, copies)
        copy_all(expected_places, [param.detach() for param in params])
        assert have_the_same_bits(memory, expected)
        assert same(module.parameters(), uncopied.parameters())


def test_a_new_backend_and_another_average_are_taken(device, triton, preparations, monkeypatch):
    module = make_module(device)
    optimizer, taken = make_optimizer(module), []
    own = lamb_step
    monkeypatch.setattr("gptbert.optim.lamb_step", lambda *args, **settings: taken.append(1) or own(*args, **settings))
    for backend, calls in (("triton", 0), ("torch", 1), ("triton", 1)):
        monkeypatch.setenv("KERNELS_BACKEND", backend)
        average = WeightAverage(module, 0.0)
        set_gradients(module, 1)
        optimizer.clip_step_average(1.0, average.by_parameter(module), average.decay)
        assert len(taken) == calls
        assert same(average.model.parameters(), module.parameters())
    assert len(preparations) == 3


def test_averages_are_of_the_model_that_is_asked_for(device):
    modules = [make_module(device) for _ in "ab"]
    average = WeightAverage(modules[0], 0.5)
    for module in (modules[0], modules[0], modules[1]):
        assert [*average.by_parameter(module)] == [*module.parameters()]
        assert list(map(id, average.by_parameter(module).values())) == list(map(id, average.model.parameters()))
    assert average.by_parameter(modules[1]) is average.by_parameter(modules[1])
