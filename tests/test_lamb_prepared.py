"""LAMB's prepared step: the operation's launches and bits, and the changes that make it inspect tensors again."""

from itertools import product

import pytest
import torch

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
