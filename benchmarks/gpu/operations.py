"""Operations, their references, eager and compiled, and peers; launched one at a time, as a user would."""

import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from benchmarks import bench_attention_context as bench_attention
from benchmarks import bench_depth_mix, bench_gated_norm, bench_lamb, bench_normalize, bench_span_mask, machine, peers
from benchmarks import bench_masked_cross_entropy as bench_cross_entropy
from benchmarks.gpu.profile import profile
from benchmarks.gpu.settings import Settings
from benchmarks.gpu.steps import launch_seconds
from benchmarks.measurement import BASELINE, COMPILED, peak_bytes
from gptbert.errors import first_line
from gptbert.optim import Lamb
from kernels.lamb import reference as lamb_reference
from kernels.numerics import Comparison

CROSS_ENTROPY = (  # N, D, V
    bench_cross_entropy.Shape(4096, 768, 32768),
    bench_cross_entropy.Shape(32768, 384, 8192),
)
FROM_LOGITS = (  # D is unused
    bench_cross_entropy.Shape(4096, 384, 8192),
    bench_cross_entropy.Shape(16384, 768, 16384),
    bench_cross_entropy.Shape(8192, 768, 32768),
)
ATTENTION = (  # B, T, H: base and small
    bench_attention.Whole(256, 128, 12),
    bench_attention.Whole(64, 512, 12),
    bench_attention.Whole(256, 128, 6),
    bench_attention.Whole(32, 128, 12),
)
MIXES = (  # R, D, M: base and small
    bench_depth_mix.Whole(32768, 768, 24),
    bench_depth_mix.Whole(4096, 768, 24),
    bench_depth_mix.Whole(32768, 384, 24),
)
GATED_NORM = (  # B, T, I: feed-forwards of base and small
    bench_gated_norm.Shape(256, 128, 2560),
    bench_gated_norm.Shape(256, 128, 1280),
)
EMBEDDING = (bench_normalize.Whole(32768, 768, 32768),)  # R, D, V
SPAN_MASK = (bench_span_mask.Shape(32, 136), bench_span_mask.Shape(256, 520))
LAMB = ("small", "base_32k")
OPTIMIZER = "optimizer"  # gptbert.optim.Lamb, which calls the operation
COMPILING = (COMPILED, OPTIMIZER, "triton", "triton_packed", "triton_load", "liger", "cut_cross_entropy")
ROUNDS, CALLS = 10, 5  # calls of a round without a device sync between them
PROFILED = 3

Run = Callable[[], object]
Proof = Callable[[], Iterator[Comparison]]


@dataclass(frozen=True)
class Job:
    """One implementation of an operation, on one shape.

    Attributes:
        operation: name and shape.
        impl: the implementation.
        make: returns the timed function, and its comparisons with the fp64 reference, or None if a different part of
            the measurement has them or they do not apply.
    """

    operation: str
    impl: str
    make: Callable[[], tuple[Run, Proof | None]]

    @property
    def name(self) -> str:
        """Name of operation and implementation."""
        return f"{self.operation}, {self.impl}"

    @property
    def is_slow_to_compile(self) -> bool:
        """Whether compilation may take minutes: a loop over a hundred tensors of different shapes."""
        return self.impl == COMPILED and self.operation.startswith("lamb")


def measure(settings: Settings, compiled_by: str) -> Iterator[dict[str, Any]]:
    """`rows`: per operation and implementation, the figures, or the reason why there are none.

    Jobs that take minutes to compile are measured if the part `compiled_by` has compiled them.
    """
    rows: dict[str, dict[str, Any]] = {}
    before = settings.result(compiled_by)
    compiled = json.loads(before.read_text(encoding="utf-8"))["seconds"] if before.exists() else {}
    for job in jobs(settings):
        if job.is_slow_to_compile and job.name not in compiled:
            row = {"left_out": f"it was not compiled before ({compiled_by})"}
        else:
            row = _row(job, settings)
        rows.setdefault(job.operation, {})[job.impl] = row
        yield {"rows": rows}
    ours = sum("ms" in row for found in rows.values() for row in found.values())
    yield {"rows": rows, "summary": f"{ours} implementations measured"}


def compile_first(settings: Settings) -> Iterator[dict[str, Any]]:
    """Call once every function that `measure` will time, to fill the caches; `measure` reports failures."""
    seconds: dict[str, float] = {}
    for job in jobs(settings):
        if job.impl in COMPILING and not peers.reason_against(job.impl):
            start = time.perf_counter()
            _attempt(lambda job=job: job.make()[0]())
            torch.compiler.reset()
            seconds[job.name] = time.perf_counter() - start
            yield {"seconds": seconds}
    yield {"seconds": seconds, "summary": f"{len(seconds)} implementations"}


def jobs(settings: Settings) -> Iterator[Job]:
    """All jobs: those of bars first, those that take minutes to compile last."""
    kinds = (_cross_entropy, _lamb, _attention, _mixes, _gated_norm, _embedding, _from_logits, _span_mask)
    found = [job for kind in kinds for job in kind(settings)]
    yield from sorted(found, key=lambda job: job.is_slow_to_compile)


def _cross_entropy(settings: Settings) -> Iterator[Job]:
    bench = bench_cross_entropy
    eager = bench.Implementation(peers.eager_cross_entropy, has_z_loss=False)
    first = ("triton_packed", "triton")
    implementations = {impl: bench.IMPLEMENTATIONS[impl] for impl in first} | {"eager": eager} | bench.IMPLEMENTATIONS
    for shape in (bench.TINY,) if settings.rehearse else CROSS_ENTROPY:
        for impl, implementation in implementations.items():
            make = functools.partial(_make_cross_entropy, shape, impl, implementation, settings)
            yield Job(f"masked_cross_entropy {shape}", impl, make)


def _make_cross_entropy(
    shape: bench_cross_entropy.Shape, impl: str, implementation: bench_cross_entropy.Implementation, settings: Settings
) -> tuple[Run, Proof]:
    bench = bench_cross_entropy
    if impl == COMPILED:
        implementation = dataclasses.replace(implementation, loss=_compiled(implementation.loss, settings))
    run = functools.partial(bench.gradients_of, implementation, bench.make_inputs(shape.N, shape.D, shape.V))
    return run, functools.partial(bench.hidden_proof, implementation, shape)


def _attention(settings: Settings) -> Iterator[Job]:
    bench = bench_attention
    for shape in (bench.TINY_WHOLE,) if settings.rehearse else ATTENTION:
        for impl, function in bench.WHOLE_IMPLEMENTATIONS.items():
            make = functools.partial(_make_attention, shape, impl, function, settings)
            yield Job(f"attention {shape}", impl, make)


def _make_attention(
    shape: bench_attention.Whole, impl: str, function: Callable, settings: Settings
) -> tuple[Run, Proof]:
    bench = bench_attention
    function = _compiled(function, settings) if impl == COMPILED else function
    run = functools.partial(bench.whole_gradients, function, bench.make_whole_inputs(shape))
    return run, functools.partial(bench.whole_proof, impl, shape)


def _mixes(settings: Settings) -> Iterator[Job]:
    for shape in (bench_depth_mix.TINY_WHOLE,) if settings.rehearse else MIXES:
        for impl, function in bench_depth_mix.WHOLE_IMPLEMENTATIONS.items():
            yield Job(f"mixes {shape}", impl, functools.partial(_make_mixes, shape, impl, function))


def _make_mixes(shape: bench_depth_mix.Whole, impl: str, function: Callable) -> tuple[Run, Proof]:
    bench = bench_depth_mix
    run = functools.partial(bench.whole_gradients, function, bench.make_whole_inputs(shape))
    return run, functools.partial(bench.whole_proof, impl, shape)


def _gated_norm(settings: Settings) -> Iterator[Job]:
    for shape in (bench_gated_norm.TINY,) if settings.rehearse else GATED_NORM:
        for impl in ("triton", BASELINE, COMPILED):
            make = functools.partial(_make_gated_norm, shape, impl, settings)
            yield Job(f"gated_norm {shape}", impl, make)


def _make_gated_norm(shape: bench_gated_norm.Shape, impl: str, settings: Settings) -> tuple[Run, Proof]:
    bench = bench_gated_norm
    function = bench.implementation(impl, functools.partial(_compiled, settings=settings))
    inputs = bench.make_inputs(shape)
    few = bench.make_inputs(dataclasses.replace(shape, B=1))
    return functools.partial(function, *inputs), lambda: bench.proof(bench.IMPLEMENTATIONS[impl](*few), *few)


def _embedding(settings: Settings) -> Iterator[Job]:
    bench = bench_normalize
    for shape in (bench.TINY_WHOLE,) if settings.rehearse else EMBEDDING:
        for impl, function in bench.WHOLE_IMPLEMENTATIONS.items():
            make = functools.partial(_make_embedding, shape, impl, function, settings)
            yield Job(f"embedding {shape}", impl, make)


def _make_embedding(
    shape: bench_normalize.Whole, impl: str, function: bench_normalize.Embed, settings: Settings
) -> tuple[Run, Proof]:
    bench = bench_normalize
    timed = _compiled(function, settings) if impl == COMPILED else function
    run = functools.partial(bench.whole_gradient, timed, *bench.make_whole_inputs(shape))
    return run, functools.partial(bench.whole_proof, function, bench.TINY_WHOLE)


def _from_logits(settings: Settings) -> Iterator[Job]:
    bench = bench_cross_entropy
    for shape in (bench.TINY,) if settings.rehearse else FROM_LOGITS:
        for impl, loss in bench.FROM_LOGITS.items():
            make = functools.partial(_make_from_logits, shape, impl, loss, settings)
            yield Job(f"cross_entropy_from_logits N={shape.N} V={shape.V}", impl, make)


def _make_from_logits(
    shape: bench_cross_entropy.Shape, impl: str, loss: bench_cross_entropy.Loss, settings: Settings
) -> tuple[Run, Proof]:
    bench = bench_cross_entropy
    loss = _compiled(loss, settings) if impl == COMPILED else loss
    logits, labels = bench.make_logits(shape.N, shape.V)
    return (
        functools.partial(bench.logits_gradient, loss, logits, labels),
        functools.partial(bench.logits_proof, loss, shape.V),
    )


def _lamb(settings: Settings) -> Iterator[Job]:
    for name in ("tiny",) if settings.rehearse else LAMB:
        yield Job(f"lamb {name}", OPTIMIZER, functools.partial(_make_optimizer, name))
        for impl in bench_lamb.IMPLEMENTATIONS:
            yield Job(f"lamb {name}", impl, functools.partial(_make_lamb, name, impl, settings))


def _make_lamb(name: str, impl: str, settings: Settings) -> tuple[Run, Proof | None]:
    sizes = bench_lamb.model_sizes(name)
    make_step = bench_lamb.IMPLEMENTATIONS[impl]
    if impl == COMPILED:
        make_step = functools.partial(make_step, step=_compiled(lamb_reference.lamb_step, settings))
    run = make_step(bench_lamb.State(sizes))
    if impl not in {"torch", "triton"}:  # peers compute something different, and the compiled one would compile again
        return run, None
    return run, functools.partial(bench_lamb.proof, make_step, sizes[: bench_lamb.PROOF_TENSORS])


def _make_optimizer(name: str) -> tuple[Run, None]:
    """The operation as the trainer calls it."""
    sizes = bench_lamb.model_sizes(name)
    state = bench_lamb.State(sizes)
    groups: dict[float, list[torch.Tensor]] = {}
    for param, grad, decay in zip(state.params, state.grads, state.decays, strict=True):
        param.requires_grad_().grad = grad
        groups.setdefault(decay, []).append(param)
    optimizer = Lamb([{"params": params, "weight_decay": decay} for decay, params in groups.items()])
    averages = dict(zip(state.params, state.averages, strict=True))
    bounds = bench_lamb.SETTINGS["max_grad_norm"], averages, bench_lamb.SETTINGS["average_decay"]
    return functools.partial(optimizer.clip_step_average, *bounds), None


def _span_mask(settings: Settings) -> Iterator[Job]:
    bench = bench_span_mask
    for shape in (bench.TINY,) if settings.rehearse else SPAN_MASK:
        for impl, mask in bench.IMPLEMENTATIONS.items():
            yield Job(f"span_mask {shape}", impl, functools.partial(_make_span_mask, shape, impl, mask, settings))


def _make_span_mask(
    shape: bench_span_mask.Shape, impl: str, mask: bench_span_mask.Mask, settings: Settings
) -> tuple[Run, Proof]:
    mask = _compiled(mask, settings) if impl == COMPILED else mask
    tokens, row_ids = bench_span_mask.make_rows(shape)
    return functools.partial(mask, tokens, row_ids), functools.partial(bench_span_mask.proof, mask, tokens, row_ids)


def _compiled(function: Callable, settings: Settings) -> Callable:
    """`torch.compile`, without code generation in a rehearsal."""
    return torch.compile(function, backend="eager" if settings.rehearse else "inductor", fullgraph=True)


def _row(job: Job, settings: Settings) -> dict[str, Any]:
    """The figures of a job, or the reason why there are none."""
    if reason := peers.reason_against(job.impl):
        return {"left_out": reason}
    row = _attempt(lambda: _figures(job, settings))
    torch.compiler.reset()  # so that the next job's compilation does not count as a recompilation
    return row


def _attempt(action: Callable[[], Any]) -> Any:
    """The action's result, or its error; an error after which the GPU is unusable is raised."""
    try:
        return action()
    except pytest.skip.Exception as reason:
        return {"left_out": str(reason)}
    except Exception as error:  # noqa: BLE001 - peers can raise anything
        machine.synchronize()
        return {"failed": f"{type(error).__name__}: {first_line(error)}"}


def _figures(job: Job, settings: Settings) -> dict[str, Any]:
    """Figures of a correct job: `ms` per call, the median of rounds of consecutive calls; `host_ms` until a call that
    starts on an idle device has launched; `peak_mb` without the inputs; and those of `benchmarks.gpu.profile`.
    """  # noqa: D205
    run, proof = job.make()
    wrong = next((result for result in proof() if not result.passed), None) if proof else None
    if wrong:
        return {"failed": f"{wrong.name}: error {wrong.error:.2e}, allowed {wrong.bound:.2e}"}
    for _ in range(2):
        run()
    calls = settings.times(CALLS, 1)
    rounds = [machine.seconds(lambda: [run() for _ in range(calls)]) / calls for _ in range(settings.times(ROUNDS, 2))]
    host = [launch_seconds(run) for _ in range(len(rounds))]
    kernels = profile(run, PROFILED)
    figures = {"ms": 1e3 * statistics.median(rounds), "host_ms": 1e3 * statistics.median(host), **kernels}
    if machine.device().type == "cuda":
        figures["peak_mb"] = peak_bytes(run) / 1e6
    return figures
