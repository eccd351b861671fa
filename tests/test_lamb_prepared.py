"""LAMB's prepared step: the operation's launches and bits, and the changes that make it inspect tensors again."""

from itertools import product

import pytest
import torch

from gptbert.optim import Lamb, WeightAverage
from kernels import lamb_step
from kernels.lamb import PreparedStep, chunk_table, kernel, op
from tests.numerics import same
from tests.test_lamb import Model

KERNELS = ("norm_kernel", "clip_kernel", "moments_kernel", "update_kernel")
SETTINGS = {"lr": 0.5, "beta1": 0.9, "beta2": 0.98, "eps": 1e-8, "average_decay": 0.9}
DECAYS = [0.1, 0.0, 0.3, 0.0]


class Recorder:
    """Replaces a kernel: records grid, arguments and options, and launches nothing."""

    def __init__(self, name, launches):
        self.name, self.launches = name, launches

    def __getitem__(self, grid):
        def launch(*args, **options):
            values = [(arg.dtype, arg.shape, arg.tolist()) if isinstance(arg, torch.Tensor) else arg for arg in args]
            self.launches.append((self.name, grid, values, options))

        return launch


@pytest.fixture
def recorded(monkeypatch):
    """Recorded launches, not executed; torch.empty returns zeros, so that contents are deterministic."""
    launches = []
    for name in KERNELS:
        monkeypatch.setattr(kernel, name, Recorder(name, launches))
    monkeypatch.setattr(torch, "empty", torch.zeros)
    monkeypatch.setattr(torch, "empty_like", torch.zeros_like)
    return launches


def prepare(model, averaged=True):
    averages = model.averages if averaged else []
    return PreparedStep(model.params, model.exp_avgs, model.exp_avg_sqs, model.steps, averages, DECAYS)


def plain(model, grads, averaged=True, **settings):
    state = (model.params, grads, model.exp_avgs, model.exp_avg_sqs, model.steps)
    averages = model.averages if averaged else None
    return lamb_step(*state, averages=averages, weight_decay=DECAYS, backend="triton", **SETTINGS | settings)


CLIPPING = ({}, {"max_grad_norm": 1.0}, {"max_grad_norm": 1.0, "gradient_norm": 8.0})
TYPES = (torch.float32, torch.bfloat16)


def make_model(device, grads=torch.float32, moments=torch.float32):
    model = Model(device)
    model.grads = [grad.to(grads) for grad in model.grads]
    model.exp_avgs, model.exp_avg_sqs = ([t.to(moments) for t in each] for each in (model.exp_avgs, model.exp_avg_sqs))
    return model


def test_the_launches_are_the_operations(device, recorded):
    """Grids, arguments (including tables of addresses) and options, in order."""
    for averaged, given, grads, moments in product((True, False), CLIPPING, TYPES, TYPES):
        model, clipping = make_model(device, grads, moments), dict(given)
        if "gradient_norm" in given:
            clipping["gradient_norm"] = torch.tensor(given["gradient_norm"], device=device)
        prepared, rates = prepare(model, averaged), (0.5, torch.tensor(0.25, device=device))
        for lr in rates:
            prepared(model.grads, **SETTINGS | clipping | {"lr": lr})
            own, recorded[:] = list(recorded), []
            plain(model, model.grads, averaged, lr=lr, **clipping)
            assert own == recorded
            assert len(own) == (4 if clipping.keys() == {"max_grad_norm"} else 2)
            recorded.clear()


def test_steps_are_those_of_the_operation_to_the_bit(device):
    """Gradients are reallocated at each step; one step is skipped."""
    models = [Model(device) for _ in "ab"]
    prepared = prepare(models[0])
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        grads = [torch.randn(grad.shape, generator=generator).to(device) for grad in models[0].grads]
        if step == 2:
            grads[1][3] = torch.inf
        rate = {"lr": 0.5 / (step + 1)}
        norms = [prepared([grad.clone() for grad in grads], max_grad_norm=1.0, **SETTINGS | rate)]
        norms.append(plain(models[1], grads, max_grad_norm=1.0, **rate))
        assert same(norms[:1], norms[1:])
        assert norms[0].isfinite() == (step != 2)
        assert same(models[0].state(), models[1].state())
    assert [step.item() for step in models[0].steps] == [3, 4, 5, 6]


@pytest.fixture
def checks(monkeypatch):
    """One entry for each time that tensors are inspected."""
    made, own = [], op.check_tensors
    monkeypatch.setattr(op, "check_tensors", lambda *lists: made.append(1) or own(*lists))
    return made


def test_tensors_are_looked_through_once(device, recorded, checks):
    model = Model(device)
    prepared = prepare(model)
    for _ in range(3):
        prepared([grad.clone() for grad in model.grads], **SETTINGS)
    assert len(checks) == 1
    prepared([grad.bfloat16() for grad in model.grads], **SETTINGS)
    assert len(checks) == 2
    model.exp_avgs[2].data = model.exp_avgs[2].clone()
    prepared([grad.bfloat16() for grad in model.grads], **SETTINGS)
    assert len(checks) == 3


def shorten(model):
    del model.grads[3]


def widen(model):
    model.grads[1] = torch.ones(34, device=model.grads[1].device)


def mix(model):
    model.grads[1] = model.grads[1].bfloat16()


def narrow(model):
    model.params[0].data = model.params[0].half()


def narrow_moment(model):
    model.exp_avg_sqs[0].data = model.exp_avg_sqs[0].half()


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (shorten, {}, "grads: 3 tensors for 4 parameters"),
        (widen, {}, r"grads\[1\]: \(34,\), its parameter \(33,\)"),
        (mix, {}, r"grads\[1\]: torch.bfloat16, expected torch.float32"),
        (narrow, {}, "params: torch.float16; small updates need fp32"),
        (narrow_moment, {}, "exp_avg_sqs"),
        (None, {"beta1": 1.0}, r"beta1: 1.0 is not in \[0, 1\)"),
        (None, {"max_grad_norm": -1.0}, "max_grad_norm: -1.0"),
        (None, {"lr": torch.ones(2)}, "lr: torch.float32 of 2 elements"),
    ],
)
@pytest.mark.parametrize("later", [False, True])
def test_what_does_not_fit_is_one_clear_error(device, recorded, change, settings, message, later):
    """At the first step, and if it changes during a run."""
    model = Model(device)
    prepared = prepare(model)
    if later:
        prepared(model.grads, **SETTINGS)
        recorded.clear()
    if change:
        change(model)
    with pytest.raises(ValueError, match=message):
        prepared(model.grads, **SETTINGS | settings)
    assert not recorded


def test_gradients_may_have_any_strides(device):
    models = [Model(device) for _ in "ab"]
    turned = [grad.T.contiguous().T if grad.ndim == 2 else grad for grad in models[0].grads]
    assert not turned[0].is_contiguous()
    prepare(models[0])(turned, max_grad_norm=1.0, **SETTINGS)
    plain(models[1], models[1].grads, max_grad_norm=1.0)
    assert same(models[0].state(), models[1].state())


def test_a_graph_is_captured_with_tables_that_stay(device, recorded, monkeypatch):
    monkeypatch.setattr(chunk_table, "_captured", [])
    model = Model(device)
    prepared = prepare(model)
    prepared(model.grads, max_grad_norm=1.0, **SETTINGS)
    monkeypatch.setattr(chunk_table, "is_capturing", lambda device: True)
    prepared(model.grads, max_grad_norm=1.0, **SETTINGS)
    assert len(chunk_table._captured) == 1
    with pytest.raises(RuntimeError, match="call it once with the same tensors"):
        prepared([grad.clone() for grad in model.grads], max_grad_norm=1.0, **SETTINGS)


def test_a_backward_that_needs_the_old_weights_is_an_error(device, recorded):
    """As after any other in-place change."""
    weight = torch.ones(3, device=device, requires_grad=True)
    loss = (weight * weight).sum()
    state = [[torch.zeros(3, device=device)] for _ in range(2)]
    step = PreparedStep([weight], *state, [torch.zeros((), device=device)], [], [0.0])
    step([torch.ones(3, device=device)], **SETTINGS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# copies

COPIED = ((7, 5), (33,), (1,), (16, 24), (1, 20_001), (0, 3))


def lay_out(params, dtype, offset=0, without=()):
    """A memory of sevens, and a copy of each parameter in it, 16 to 32 elements apart, `offset` from alignment."""
    begins, end = [], 0
    for param in params:
        begins.append(end + 16 + offset)
        end = -(-(begins[-1] + param.numel()) // 16) * 16
    memory = torch.full((end + 16,), 7.0, dtype=dtype, device=params[0].device)
    places = zip(begins, params, strict=True)
    copies = [memory[begin : begin + param.numel()].view(param.shape) for begin, param in places]
    return memory, [None if index in without else copy for index, copy in enumerate(copies)]


def copy_all(copies, params):
    for copy, param in zip(copies, params, strict=True):
        if copy is not None:
            copy.copy_(param)


def prepare_copied(model, copies):
    state = (model.params, model.exp_avgs, model.exp_avg_sqs, model.steps, model.averages)
    return PreparedStep(*state, [0.1, 0.0, 0.3, 0.0, 0.1, 0.1], copies)


def have_the_same_bits(one, other):
    integers = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
    return one.dtype == other.dtype and torch.equal(one.view(integers[one.dtype]), other.view(integers[other.dtype]))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("offset", "without"), [(0, ()), (0, (0, 4)), (1, (1,)), (0, range(6))])
def test_copies_are_the_new_parameters_and_nothing_else_is_written(device, dtype, offset, without):
    """With clipping and averages, over a skipped step; all else has the bits of steps without copies."""
    model, uncopied = (Model(device, COPIED) for _ in "ab")
    memory, copies = lay_out(model.params, dtype, offset, without)
    expected, expected_copies = lay_out(model.params, dtype, offset, without)
    steps = prepare_copied(model, copies), prepare_copied(uncopied, ())
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        grads = [torch.randn(shape, generator=generator).to(device) for shape in COPIED]
        if step in {0, 2}:
            grads[3][2, 5] = torch.nan
        else:
            copy_all(copies, model.params)  # not only where they differ
        for prepared in steps:
            prepared([grad.clone() for grad in grads], max_grad_norm=1.0, **SETTINGS)
        if step > 0:
            copy_all(expected_copies, model.params)
        assert have_the_same_bits(memory, expected), "a first step that is skipped writes nothing"
        assert same(model.state(), uncopied.state())
    assert [step.item() for step in model.steps] == [2, 3, 4, 5, 6, 7]


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_every_number_is_rounded_as_by_pytorch(device):
    """Of any exponent, subnormal ones and infinities among them, and halfway between two bf16 numbers."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (60_000,), generator=generator).int()
    halfway = (bits[:20_000] & ~0xFFFF) | 0x8000
    subnormal = bits[20_000:30_000] & ~0x7F800000
    values = torch.cat([bits, halfway, subnormal]).view(torch.float32)
    values = torch.cat([values[values.isfinite()], torch.tensor([3.4e38, -3.4e38, 3.3e38, 0.0, -0.0])]).to(device)
    for lr in (0.0, 3e38):  # the same numbers; and large ones and infinities
        param, copy = values.clone(), torch.zeros_like(values, dtype=torch.bfloat16)
        state = [[torch.zeros_like(values)] for _ in range(2)]
        prepared = PreparedStep([param], *state, [torch.zeros((), device=device)], [], [0.0], [copy])
        prepared([torch.ones_like(values).copysign(-values)], **SETTINGS | {"lr": lr})
        assert param.isinf().any() == (lr > 0)
        assert copy.isinf().any(), "some numbers round to it"
        assert have_the_same_bits(copy, param.to(torch.bfloat16))
    values[7] = torch.nan
    param = values.clone()
    PreparedStep([param], *state, [torch.zeros((), device=device)], [], [0.0], [copy])([values], **SETTINGS)
    assert param[7].isnan()
    assert copy[7].isnan()


@pytest.mark.parametrize("offset", [0, 1])
def test_wide_words_need_aligned_copies(device, recorded, offset):
    model = Model(device, COPIED)
    _, copies = lay_out(model.params, torch.bfloat16, offset, without=(1,))
    prepare_copied(model, copies)(model.grads, **SETTINGS)
    assert [options["ALIGNED"] for *_, options in recorded] == [offset == 0] * 2


def test_a_backward_that_needs_the_old_copy_is_an_error(device, recorded):
    param, copy, x = torch.ones(3, device=device), torch.ones(1, 3, device=device), torch.ones(3, device=device)
    loss = (copy * x.requires_grad_()).sum()  # of the matrix that the copy is a part of
    state = [[torch.zeros(3, device=device)] for _ in range(2)]
    step = PreparedStep([param], *state, [torch.zeros((), device=device)], [], [0.0], [copy[0]])
    step([torch.ones(3, device=device)], **SETTINGS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda copies: copies[:3], "copies: 3 tensors or None for 4 parameters"),
        (lambda copies: [copy.half() for copy in copies], "copies: torch.float16; expected all torch.float32 or all"),
        (lambda copies: [copies[0].float(), *copies[1:]], "copies: torch.*, torch.*; expected all torch.float32"),
        (lambda copies: [None, *copies[1:3], copies[3].mT], r"copies\[3\]: \(24, 16\) on .*, its parameter"),
        (lambda copies: [copies[0].mT.contiguous().mT, *copies[1:]], r"copies\[0\]: .* must be contiguous"),
    ],
)
def test_copies_that_do_not_fit_are_one_clear_error(device, recorded, change, message):
    model = Model(device)
    copies = change([param.bfloat16() for param in model.params])
    with pytest.raises(ValueError, match=message):
        PreparedStep(model.params, model.exp_avgs, model.exp_avg_sqs, model.steps, [], DECAYS, copies)(
            model.grads, **SETTINGS
        )
    assert not recorded


# the optimizer


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
