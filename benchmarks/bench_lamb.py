"""A step of LAMB on all tensors of a model: clipping to a global norm, update, moving average of the weights; all fp32.

The minimum is 52 bytes per parameter (derived in `benchmarks.traffic`). `pytorch_lamb` (pytorch_optimizer's) and
`fused_adamw` (PyTorch's, the floor: no trust ratio, so no second pass) get the same clipping and average.
On a GPU a small model's step takes the host longer than the kernels; a separate benchmark measures that.
"""

import functools
from collections.abc import Callable, Iterator
from itertools import chain, cycle

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from benchmarks import machine
from benchmarks.measurement import BASELINE, COMPILED, Measurement
from benchmarks.traffic import LAMB_BYTES
from gptbert.config import ModelConfig
from gptbert.model import GPTBert
from gptbert.optim import Lamb, WeightAverage, parameter_groups, update_weights
from kernels import lamb_step
from kernels.backend import BACKENDS
from kernels.lamb import check, reference
from kernels.lamb.arguments import Clipping, Settings, Tensors
from kernels.numerics import Comparison, compare

PROOF_TENSORS = 12  # the first of a model: embeddings and a layer's
SETTINGS = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.98, "eps": 1e-8, "average_decay": 0.999}
MAX_GRAD_NORM = 2.0
WEIGHT_DECAY = 0.1

Sizes = list[tuple[torch.Size, float]]  # shape and weight decay of each parameter
Step = Callable[[], object]


class State:
    """A model's parameters and gradients, and LAMB's state after three steps; the same at every call."""

    def __init__(self, sizes: Sizes, dtype: torch.dtype = torch.float32) -> None:
        here = machine.device()
        generator = torch.Generator(here).manual_seed(len(sizes))
        self.params, self.grads, self.exp_avgs, self.averages = (
            [0.02 * torch.randn(shape, generator=generator, device=here).to(dtype) for shape, _ in sizes]
            for _ in range(4)
        )
        self.exp_avg_sqs = [exp_avg.square() for exp_avg in self.exp_avgs]
        self.steps = [torch.tensor(3.0, device=here) for _ in sizes]
        self.decays = [decay for _, decay in sizes]
        self.gradient_norm = torch.zeros((), dtype=dtype, device=here)


def _reference(state: State, step: Callable[..., None] = reference.lamb_step) -> Step:
    return functools.partial(
        torch.no_grad()(step),
        Tensors(state.params, state.grads, state.exp_avgs, state.exp_avg_sqs, state.steps, state.averages),
        Clipping(MAX_GRAD_NORM, state.gradient_norm),
        Settings(weight_decays=state.decays, **SETTINGS),
    )


def _ours(state: State, backend: str) -> Step:
    return functools.partial(
        lamb_step,
        *(state.params, state.grads, state.exp_avgs, state.exp_avg_sqs, state.steps),
        weight_decay=state.decays,
        averages=state.averages,
        max_grad_norm=MAX_GRAD_NORM,
        backend=backend,
        **SETTINGS,
    )


def _with_optimizer(state: State, make_optimizer: Callable[..., Optimizer]) -> Step:
    """Clipping, an optimizer step, and the average, as a trainer calls them."""
    decayed = [{"params": [], "weight_decay": decay} for decay in (WEIGHT_DECAY, 0.0)]
    for param, grad, decay in zip(state.params, state.grads, state.decays, strict=True):
        param.requires_grad_().grad = grad
        decayed[decay == 0]["params"].append(param)
    optimizer = make_optimizer(
        decayed, lr=SETTINGS["lr"], betas=(SETTINGS["beta1"], SETTINGS["beta2"]), eps=SETTINGS["eps"]
    )
    average = get_ema_multi_avg_fn(SETTINGS["average_decay"])

    def step() -> None:
        clip_grad_norm_(state.params, MAX_GRAD_NORM)
        optimizer.step()
        average(state.averages, state.params, None)

    return step


def _pytorch_optimizer_lamb(*args: object, **settings: object) -> Optimizer:
    return pytest.importorskip("pytorch_optimizer").Lamb(*args, **settings)


IMPLEMENTATIONS = {
    BASELINE: _reference,
    COMPILED: _reference,
    "torch": functools.partial(_ours, backend="torch"),
    "triton": functools.partial(_ours, backend="triton"),
    "cpp": functools.partial(_ours, backend="cpp"),
    "pytorch_lamb": functools.partial(_with_optimizer, make_optimizer=_pytorch_optimizer_lamb),
    "fused_adamw": functools.partial(_with_optimizer, make_optimizer=functools.partial(AdamW, fused=True)),
}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", ["small", "base"])
def test_lamb(measurement: Measurement, impl: str, shape: str) -> None:
    """One step of all parameters of configs/<shape>.json."""
    if impl == COMPILED and machine.device().type == "cpu" and measurement.enabled:
        pytest.skip("Inductor compiles the loop over 127 tensors for minutes on a CPU")
    sizes = model_sizes(shape) if measurement.enabled else model_sizes("tiny")[:PROOF_TENSORS]
    make_step = IMPLEMENTATIONS[impl]
    if impl == COMPILED:
        make_step = functools.partial(_reference, step=measurement.compiled(reference.lamb_step))
    if impl in {"pytorch_lamb", "fused_adamw"}:
        measurement.exempt()  # the first has no bias correction and clamps ‖p‖, the second is not LAMB
    else:
        thorough = impl in BACKENDS and measurement.enabled
        ours = check.comparisons(machine.device(), impl) if thorough else ()
        measurement.prove(chain(proof(make_step, sizes[:PROOF_TENSORS]), ours))
    run, baseline = make_step(State(sizes)), _reference(State(sizes))
    numel = sum(shape.numel() for shape, _ in sizes)
    measurement.time(run, baseline, None if impl == "fused_adamw" else LAMB_BYTES * numel)


class _Nothing:
    """A kernel whose launch is a no-op."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *_, **__: None


@pytest.mark.parametrize("shape", ["small", "base"])
def test_lamb_host(benchmark: BenchmarkFixture, shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Host time of an optimizer step with clipping and average, without the launches."""
    kernel = pytest.importorskip("kernels.lamb.kernel", reason="Triton is not installed")
    for name in ("norm_kernel", "clip_kernel", "moments_kernel", "update_kernel"):
        monkeypatch.setattr(kernel, name, _Nothing())
    monkeypatch.setattr("kernels.backend.interpreted", lambda: True)  # so that CPU tensors are accepted
    monkeypatch.setenv("KERNELS_BACKEND", "triton")
    model = GPTBert(ModelConfig.from_json(f"configs/{shape if benchmark.enabled else 'tiny'}.json")).to(
        machine.device()
    )
    optimizer, average = Lamb(parameter_groups(model, WEIGHT_DECAY), lr=1e-3), WeightAverage(model, 0.999)
    gradients = [[torch.zeros_like(param) for param in model.parameters()] for _ in range(2)]
    turns = cycle(gradients)  # new at each step, at one of a few addresses

    def new_gradients() -> None:
        for param, gradient in zip(model.parameters(), next(turns), strict=True):
            param.grad = gradient

    benchmark.group = f"lamb_host {shape}"
    benchmark.pedantic(
        lambda: update_weights(optimizer, model, average, MAX_GRAD_NORM),
        setup=new_gradients,
        rounds=200 if benchmark.enabled else 1,
        warmup_rounds=2,
    )
    benchmark.extra_info["tensors"] = len(gradients[0])


def model_sizes(name: str) -> Sizes:
    """Shape and weight decay of every parameter of a model in configs/."""
    with torch.device("meta"):
        model = GPTBert(ModelConfig.from_json(f"configs/{name}.json"))
    groups = parameter_groups(model, WEIGHT_DECAY)
    decays = {id(param): group["weight_decay"] for group in groups for param in group["params"]}
    return [(param.shape, decays[id(param)]) for param in model.parameters()]


def proof(make_step: Callable[[State], Step], sizes: Sizes) -> Iterator[Comparison]:
    """All outputs of a step, against the fp64 reference."""
    actual, exact, plain = State(sizes), State(sizes), State(sizes)
    for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "averages"):
        setattr(exact, name, [tensor.double() for tensor in getattr(exact, name)])
    exact.gradient_norm = exact.gradient_norm.double()
    make_step(actual)()
    for state in (exact, plain):
        _reference(state)()
    for name in ("params", "exp_avgs", "exp_avg_sqs", "averages"):
        each = zip(getattr(actual, name), getattr(exact, name), getattr(plain, name), strict=True)
        for index, tensors in enumerate(each):
            yield from compare(f"{name}[{index}]", *tensors)
