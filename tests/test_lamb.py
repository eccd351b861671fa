"""LAMB against its reference and its specification; tests/test_lamb_optimizer.py covers `gptbert.optim.Lamb`."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.utils import clip_grad_norm_

from kernels import lamb_step
from kernels.lamb import check, chunk_table, eager, op, reference
from kernels.lamb.arguments import Clipping, Settings, Tensors
from tests.numerics import close, same

STEP = {"lr": 0.5, "beta1": 0.9, "beta2": 0.98, "eps": 1e-8}
SHAPES = ((7, 5), (33,), (1,), (16, 24))


@pytest.fixture
def poisoned_memory():
    """Fills memory from torch.empty with NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def one_step(param, grad, weight_decay, backend, device):
    param, moments = param.to(device, copy=True), [torch.zeros_like(param, device=device) for _ in "mv"]
    lamb_step(
        [param],
        [grad.to(device)],
        [moments[0]],
        [moments[1]],
        [torch.zeros((), device=device)],
        **STEP,
        weight_decay=weight_decay,
        backend=backend,
    )
    return param.cpu()


def test_a_zero_parameter_moves_with_ratio_one(backend, device):
    grad = torch.tensor([3.0, -2.0, 1e-3])
    moved = one_step(torch.zeros(3), grad, 0.1, backend, device)
    torch.testing.assert_close(moved, -0.5 * grad.sign(), rtol=1e-4, atol=0)


def test_a_zero_update_changes_nothing_and_is_no_nan(backend, device):
    assert torch.equal(one_step(torch.zeros(3), torch.zeros(3), 0.1, backend, device), torch.zeros(3))
    assert torch.equal(one_step(torch.ones(3), torch.zeros(3), 0.0, backend, device), torch.ones(3))


def test_a_zero_gradient_leaves_only_the_decay(backend, device):
    """u = wd·p, so the ratio is 1/wd and p shrinks by lr·p."""
    moved = one_step(torch.tensor([1.0, -2.0, 4.0]), torch.zeros(3), 0.1, backend, device)
    torch.testing.assert_close(moved, torch.tensor([0.5, -1.0, 2.0]))


def test_gradients_clipped_to_zero_leave_the_moments_to_decay(backend, device):
    clipped, without = Model(device), Model(device)
    without.grads = [torch.zeros_like(grad) for grad in without.grads]
    clipped.step(backend, max_grad_norm=0.0)
    without.step(backend)
    assert same(clipped.state(), without.state())


def test_the_ratio_is_not_clamped(backend, device):
    large = torch.full((100,), 1e4)  # ‖p‖ = 1e5, ‖u‖ about 1e4
    moved = one_step(large, torch.ones(100), 1e-6, backend, device)
    torch.testing.assert_close(moved, torch.full((100,), 0.5e4), rtol=1e-4, atol=0)


class Model:
    """Parameters and optimizer state, deterministic by seed."""

    def __init__(self, device, shapes=SHAPES, seed=0, dtype=torch.float32):
        generator = torch.Generator().manual_seed(seed)
        self.params, self.grads, self.exp_avgs, self.exp_avg_sqs, self.averages = (
            [torch.randn(shape, generator=generator, dtype=dtype).to(device) for shape in shapes] for _ in range(5)
        )
        self.exp_avg_sqs = [tensor.square() + 0.1 for tensor in self.exp_avg_sqs]
        self.steps = [torch.tensor(float(index), device=device) for index in range(len(shapes))]

    def step(self, backend, averaged=True, **settings):
        return lamb_step(
            self.params,
            self.grads,
            self.exp_avgs,
            self.exp_avg_sqs,
            self.steps,
            **{**STEP, "weight_decay": 0.1, "averages": self.averages if averaged else None, **settings},
            backend=backend,
        )

    def state(self):
        return [*self.params, *self.exp_avgs, *self.exp_avg_sqs, *self.steps, *self.averages]


@pytest.mark.usefixtures("poisoned_memory")
def test_every_case_obeys_the_numerics_rule(backend, device):
    results = list(check.comparisons(device, backend))
    assert not [result for result in results if not result.passed]
    assert {result.name.split(": ")[1] for result in results} == {
        "params", "exp_avgs", "exp_avg_sqs", "averages", "gradient norm", "gradient norm again", "steps", "again",
        "memory to leave alone", "norm that is finite", "skipped", *(["copies"] if backend == "triton" else []),
    }  # fmt: skip


def test_clips_as_torch_does(backend, device):
    """Equals clipping first, both above and below the norm limit; gradients are not modified."""
    for max_norm in (1.0, 1e3):
        fused, separate = Model(device), Model(device)
        parameters = [torch.zeros_like(grad) for grad in separate.grads]
        for parameter, grad in zip(parameters, separate.grads, strict=True):
            parameter.grad = grad
        expected = clip_grad_norm_(parameters, max_norm)
        before = [grad.clone() for grad in fused.grads]
        assert separate.step(backend) is None
        torch.testing.assert_close(fused.step(backend, max_grad_norm=max_norm), expected)
        assert close(fused.state(), separate.state())
        assert same(fused.grads, before)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("moment_type", [torch.float32, torch.bfloat16])
def test_a_step_whose_gradients_are_not_finite_is_skipped(backend, device, bad, moment_type):
    """Also with bf16 moments (in the reference on CPUs): skipped steps must not advance stochastic rounding."""
    seed = 3 if moment_type == torch.bfloat16 else None
    skipping, straight = Model(device), Model(device)
    for model in (skipping, straight):
        model.exp_avgs, model.exp_avg_sqs = (
            [tensor.to(moment_type) for tensor in moments] for moments in (model.exp_avgs, model.exp_avg_sqs)
        )
    good = skipping.grads[1][4].item()
    for value in (bad, good, bad, good):
        skipping.grads[1][4] = value
        before = [tensor.clone() for tensor in skipping.state()]
        norm = skipping.step(backend, max_grad_norm=1.0, stochastic_rounding_seed=seed)
        assert norm.isnan() == math.isnan(value)
        assert norm.isinf() == math.isinf(value)
        assert same(skipping.state(), before) == (not math.isfinite(value))
    for _ in range(2):
        straight.step(backend, max_grad_norm=1.0, stochastic_rounding_seed=seed)
    assert same(skipping.state(), straight.state())


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_without_clipping_no_step_is_skipped(backend, device):
    model = Model(device)
    model.grads[1][4] = math.nan
    model.step(backend)
    assert [step.item() for step in model.steps] == [1, 2, 3, 4]
    assert [param.isnan().any().item() for param in model.params] == [False, True, False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_norm_that_is_given_is_the_one_that_clips(backend, device, dtype):
    """The norm over several calls' gradients; clipping by one call's own norm would be too weak."""
    given, separate = Model(device, dtype=dtype), Model(device, dtype=dtype)
    separate.grads = [0.25 * grad for grad in separate.grads]
    norm = torch.tensor(8.0 - 1e-6, device=device, dtype=torch.float64)
    separate.step(backend)
    assert given.step(backend, max_grad_norm=2.0, gradient_norm=norm).item() == pytest.approx(8.0)
    assert close(given.state(), separate.state())
    before = [tensor.clone() for tensor in given.state()]
    for bad in (math.nan, math.inf):
        assert not given.step(backend, max_grad_norm=2.0, gradient_norm=torch.full_like(norm, bad)).isfinite()
        assert same(given.state(), before)


def test_the_reference_waits_for_no_device():
    """GPUs run the reference in fp64. Fake tensors have no data, so a device sync raises."""
    with FakeTensorMode():
        model = Model(torch.device("cpu"))
        state = (model.params, model.grads, model.exp_avgs, model.exp_avg_sqs, model.steps, model.averages)
        settings = Settings(**STEP, weight_decays=[0.1] * 4, average_decay=0.9)
        arguments = Tensors(*state), Clipping(1.0, torch.empty(())), settings
        reference.lamb_step(*arguments)
        with pytest.raises(DataDependentOutputException):
            eager.lamb_step(*arguments)


def test_stochastic_rounding_is_right_on_average(backend, device):
    """m = 0.1·g is between two bf16 numbers, where round to nearest always errs in the same direction."""
    size, grad = 20_000, 1.0 + 2**-7
    means, moments = [], []
    for seed in (None, 1, 2):
        model = Model(device, [(size,)])
        model.grads = [torch.full((size,), grad, device=device)]
        model.exp_avgs, model.exp_avg_sqs = ([torch.zeros(size, dtype=torch.bfloat16, device=device)] for _ in "mv")
        model.step(backend, stochastic_rounding_seed=seed)
        moments.append(model.exp_avgs[0])
        means.append(model.exp_avgs[0].double().mean().item())
    exact, spacing = 0.1 * grad, 2**-4 * torch.finfo(torch.bfloat16).eps
    assert abs(means[0] - exact) > 0.1 * spacing, "or there is nothing to gain"
    assert means[1:] == pytest.approx([exact] * 2, abs=4 * spacing / 2 / size**0.5)
    assert len(moments[1].unique()) == 2
    assert not torch.equal(moments[1], moments[2])


def test_a_learning_rate_on_the_device_is_the_same_one(backend, device):
    models = [Model(device), Model(device)]
    models[0].step(backend)
    models[1].step(backend, lr=torch.tensor(STEP["lr"], device=device))
    assert same(models[0].state(), models[1].state())


def test_a_decay_for_each_tensor(backend, device):
    together, apart = Model(device), Model(device)
    together.step(backend, weight_decay=[0.1, 0.0, 0.3, 0.0])
    for index, decay in enumerate((0.1, 0.0, 0.3, 0.0)):
        one = Model(device)
        for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "averages", "steps"):
            setattr(one, name, [getattr(apart, name)[index]])
        one.step(backend, weight_decay=decay)
    assert same(together.state(), apart.state())


def test_no_tensors_and_empty_tensors(backend, device):
    nothing = Model(device, [])
    assert nothing.step(backend) is None
    assert nothing.step(backend, max_grad_norm=1.0) == 0
    assert nothing.step(backend, max_grad_norm=1.0, gradient_norm=torch.tensor(3.0)) == 3
    empty = Model(device, [(0,), (3, 0)])
    assert empty.step(backend, max_grad_norm=1.0) == 0
    assert [step.item() for step in empty.steps] == [1, 2]


def test_blocks_give_the_same_bits_on_any_number_of_threads():
    shapes = [(300_001,), (1000, 333), (4097,)]
    models = [Model(torch.device("cpu"), shapes) for _ in range(3)]
    norms = []
    for threads, model in zip((1, 2, 3), models, strict=True):
        torch.set_num_threads(threads)
        norms.append(model.step("torch", max_grad_norm=1.0))
    torch.set_num_threads(1)
    assert all(same(model.state(), models[0].state()) for model in models[1:])
    assert norms[0] == norms[1] == norms[2]


def test_tensors_that_moved_are_found_again(device):
    """Gradients are reallocated at each step, at varying addresses."""
    moving, still = Model(device), Model(device)
    chunk_table.make_chunk_table.cache_clear()
    places = [moving.grads] + [[grad.clone() for grad in moving.grads] for _ in range(2)]
    for step in range(4):
        moving.grads = places[max(0, step - 1)]
        moving.step("triton", max_grad_norm=1.0)
        assert chunk_table.make_chunk_table.cache_info().misses == (1, 1, 2, 3)[step]
    for _ in range(4):
        still.step("triton", max_grad_norm=1.0)
    assert same(moving.state(), still.state())


def test_a_graph_is_captured_with_tables_that_stay(device, monkeypatch):
    """Capture is simulated: without a GPU, only the host's side of it can be tested."""
    monkeypatch.setattr(chunk_table, "_captured", [])
    model, other = Model(device), Model(device)
    model.step("triton", max_grad_norm=1.0)
    monkeypatch.setattr(chunk_table, "is_capturing", lambda device: True)
    model.step("triton", max_grad_norm=1.0)
    assert [tables.owners.numel() for tables in chunk_table._captured] == [4]
    with pytest.raises(RuntimeError, match="call it once with the same tensors"):
        other.step("triton", max_grad_norm=1.0)


def drop(model):
    del model.grads[1]


def halve(name, dtype=torch.float16):
    def change(model):
        setattr(model, name, [tensor.to(dtype) for tensor in getattr(model, name)])

    return change


def replace(name, make):
    def change(model):
        getattr(model, name)[3] = make(getattr(model, name)[3])

    return change


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (drop, {}, "grads: 3 tensors for 4 parameters"),
        (replace("grads", lambda tensor: None), {}, r"grads\[3\]: None; leave the parameter out"),
        (None, {"weight_decay": [0.1]}, "weight_decay: 1 numbers for 4"),
        (None, {"beta2": 1.0}, r"beta2: 1.0 is not in \[0, 1\)"),
        (None, {"max_grad_norm": -1.0}, "max_grad_norm: -1.0 is not a number from 0"),
        (None, {"max_grad_norm": math.nan}, "max_grad_norm: nan is not a number from 0"),
        (None, {"gradient_norm": torch.ones(())}, "gradient_norm: clips nothing without max_grad_norm"),
        (None, {"lr": torch.ones(2)}, "lr: torch.float32 of 2 elements"),
        (None, {"lr": torch.ones((), dtype=torch.float64)}, "lr: torch.float64"),
        (None, {"stochastic_rounding_seed": 1}, "stochastic_rounding_seed: moments are torch.float32"),
        (halve("params", torch.bfloat16), {}, "params: torch.bfloat16; small updates need fp32"),
        (halve("grads"), {}, r"grads\[0\]: torch.float16, expected torch.float32"),
        (halve("exp_avgs", torch.bfloat16), {}, "exp_avgs are torch.bfloat16, exp_avg_sqs torch.float32"),
        (halve("averages", torch.bfloat16), {}, r"averages\[0\]: torch.bfloat16, expected torch.float32"),
        (halve("steps", torch.int64), {}, r"steps\[0\]: must be an fp32 scalar"),
        (replace("grads", lambda tensor: tensor.bfloat16()), {}, r"grads\[3\]: torch.bfloat16, expected torch.float32"),
        (replace("exp_avgs", lambda tensor: tensor[:, :3]), {}, r"exp_avgs\[3\]: \(16, 3\), its parameter \(16, 24\)"),
        (replace("grads", lambda tensor: tensor.T.contiguous().T), {}, r"grads\[3\]: must be dense and contiguous"),
        (replace("grads", lambda tensor: tensor.to_sparse()), {}, r"grads\[3\]: must be dense and contiguous"),
    ],
)
def test_what_does_not_fit_is_one_clear_error(backend, device, change, settings, message):
    model = Model(device)
    if change:
        change(model)
    if isinstance(settings.get("lr"), torch.Tensor):
        settings = {"lr": settings["lr"].to(device)}
    with pytest.raises(ValueError, match=message):
        model.step(backend, **settings)


def test_is_a_well_made_operation(backend, device):
    """torch.library.opcheck: schema, fake tensors, tracing."""
    for averaged, max_grad_norm in ((True, 1.0), (False, None)):
        model = Model(device)
        state = [model.params, model.grads, model.exp_avgs, model.exp_avg_sqs, model.steps]
        norm = None if max_grad_norm is None else torch.zeros((), device=device)
        settings = (0.5, None, 0.9, 0.98, 1e-8, [0.1, 0.0, 0.1, 0.1], max_grad_norm, 0.9, None, backend)
        results = torch.library.opcheck(
            op.lamb_step, (*state, model.averages if averaged else [], norm, None, *settings, None)
        )
        assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("on_device", [False, True])
def test_compiled_is_eager(backend, device, on_device):
    lr = torch.tensor(0.5, device=device) if on_device else 0.5

    def step(model):
        return model.step(backend, max_grad_norm=1.0, lr=lr) * 2, [param.sum() for param in model.params]

    eager, compiled = Model(device), Model(device)
    expected = step(eager)
    torch._dynamo.reset()
    actual = torch.compile(step, fullgraph=True, backend="aot_eager")(compiled)
    assert torch.equal(actual[0], expected[0])
    assert same(actual[1], expected[1])
    assert same(compiled.state(), eager.state())
