"""Operations, their references, eager and compiled, and peers; launched one at a time, as a user would."""

import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

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


class Logits(NamedTuple):
    """N rows of V logits."""

    N: int
    V: int

    def __str__(self) -> str:
        return f"N={self.N} V={self.V}"


CROSS_ENTROPY = (  # N, D, V
    bench_cross_entropy.Shape(4096, 768, 32768),
    bench_cross_entropy.Shape(32768, 384, 8192),
)
FROM_LOGITS = (Logits(4096, 8192), Logits(16384, 16384), Logits(8192, 32768))
TINY_LOGITS = Logits(bench_cross_entropy.TINY.N, bench_cross_entropy.TINY.V)
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
    eager = bench_cross_entropy.Implementation(peers.eager_cross_entropy, has_z_loss=False)
    first = {impl: bench_cross_entropy.IMPLEMENTATIONS[impl] for impl in ("triton_packed", "triton")}
    cross_entropies = first | {"eager": eager} | bench_cross_entropy.IMPLEMENTATIONS
    gated_norms = {impl: bench_gated_norm.IMPLEMENTATIONS[impl] for impl in ("triton", BASELINE, COMPILED)}
    lambs = {OPTIMIZER: None} | bench_lamb.IMPLEMENTATIONS
    # name, shapes, the one of a rehearsal, implementations, and what makes a job's function and proof of them
    kinds = (
        ("masked_cross_entropy", CROSS_ENTROPY, bench_cross_entropy.TINY, cross_entropies, _cross_entropy),
        ("lamb", LAMB, "tiny", lambs, _lamb),
        ("attention", ATTENTION, bench_attention.TINY_WHOLE, bench_attention.WHOLE_IMPLEMENTATIONS, _attention),
        ("mixes", MIXES, bench_depth_mix.TINY_WHOLE, bench_depth_mix.WHOLE_IMPLEMENTATIONS, _mixes),
        ("gated_norm", GATED_NORM, bench_gated_norm.TINY, gated_norms, _gated_norm),
        ("embedding", EMBEDDING, bench_normalize.TINY_WHOLE, bench_normalize.WHOLE_IMPLEMENTATIONS, _embedding),
        ("cross_entropy_from_logits", FROM_LOGITS, TINY_LOGITS, bench_cross_entropy.FROM_LOGITS, _from_logits),
        ("span_mask", SPAN_MASK, bench_span_mask.TINY, bench_span_mask.IMPLEMENTATIONS, _span_mask),
    )
    found = [
        Job(f"{operation} {shape}", impl, functools.partial(make, shape, impl, function, settings))
        for operation, shapes, tiny, implementations, make in kinds
        for shape in ((tiny,) if settings.rehearse else shapes)
        for impl, function in implementations.items()
    ]
    yield from sorted(found, key=lambda job: job.is_slow_to_compile)


def _cross_entropy(
    shape: bench_cross_entropy.Shape, impl: str, implementation: bench_cross_entropy.Implementation, settings: Settings
) -> tuple[Run, Proof]:
    bench = bench_cross_entropy
    implementation = dataclasses.replace(implementation, loss=_compiled(impl, implementation.loss, settings))
    run = functools.partial(bench.gradients_of, implementation, bench.make_inputs(shape.N, shape.D, shape.V))
    return run, functools.partial(bench.hidden_proof, implementation, shape)


def _attention(shape: bench_attention.Whole, impl: str, function: Callable, settings: Settings) -> tuple[Run, Proof]:
    bench = bench_attention
    function = _compiled(impl, function, settings)
    run = functools.partial(bench.whole_gradients, function, bench.make_whole_inputs(shape))
    return run, functools.partial(bench.whole_proof, impl, shape)


def _mixes(shape: bench_depth_mix.Whole, impl: str, function: Callable, settings: Settings) -> tuple[Run, Proof]:
    del settings
    bench = bench_depth_mix
    run = functools.partial(bench.whole_gradients, function, bench.make_whole_inputs(shape))
    return run, functools.partial(bench.whole_proof, impl, shape)


def _gated_norm(shape: bench_gated_norm.Shape, impl: str, function: Callable, settings: Settings) -> tuple[Run, Proof]:
    bench = bench_gated_norm
    timed = bench.implementation(impl, lambda forward: _compiled(impl, forward, settings))
    inputs = bench.make_inputs(shape)
    few = bench.make_inputs(dataclasses.replace(shape, B=1))
    return functools.partial(timed, *inputs), lambda: bench.proof(function(*few), *few)


def _embedding(
    shape: bench_normalize.Whole, impl: str, function: bench_normalize.Embed, settings: Settings
) -> tuple[Run, Proof]:
    bench = bench_normalize
    timed = _compiled(impl, function, settings)
    run = functools.partial(bench.whole_gradient, timed, *bench.make_whole_inputs(shape))
    return run, functools.partial(bench.whole_proof, function, bench.TINY_WHOLE)


def _from_logits(shape: Logits, impl: str, loss: bench_cross_entropy.Loss, settings: Settings) -> tuple[Run, Proof]:
    bench = bench_cross_entropy
    loss = _compiled(impl, loss, settings)
    logits, labels = bench.make_logits(shape.N, shape.V)
    return (
        functools.partial(bench.logits_gradient, loss, logits, labels),
        functools.partial(bench.logits_proof, loss, shape.V),
    )


def _lamb(name: str, impl: str, make_step: Callable | None, settings: Settings) -> tuple[Run, Proof | None]:
    sizes = bench_lamb.model_sizes(name)
    if make_step is None:
        return _optimizer(sizes), None
    if impl == COMPILED:
        make_step = functools.partial(make_step, step=_compiled(impl, lamb_reference.lamb_step, settings))
    run = make_step(bench_lamb.State(sizes))
    if impl not in {"torch", "triton"}:  # peers compute something different, and the compiled one would compile again
        return run, None
    return run, functools.partial(bench_lamb.proof, make_step, sizes[: bench_lamb.PROOF_TENSORS])


def _optimizer(sizes: bench_lamb.Sizes) -> Run:
    """LAMB as the trainer calls it."""
    state = bench_lamb.State(sizes)
    groups: dict[float, list[torch.Tensor]] = {}
    for param, grad, decay in zip(state.params, state.grads, state.decays, strict=True):
        param.requires_grad_().grad = grad
        groups.setdefault(decay, []).append(param)
    optimizer = Lamb([{"params": params, "weight_decay": decay} for decay, params in groups.items()])
    averages = dict(zip(state.params, state.averages, strict=True))
    bounds = bench_lamb.MAX_GRAD_NORM, averages, bench_lamb.SETTINGS["average_decay"]
    return functools.partial(optimizer.clip_step_average, *bounds)


def _span_mask(
    shape: bench_span_mask.Shape, impl: str, mask: bench_span_mask.Mask, settings: Settings
) -> tuple[Run, Proof]:
    mask = _compiled(impl, mask, settings)
    tokens, row_ids = bench_span_mask.make_rows(shape)
    return functools.partial(mask, tokens, row_ids), functools.partial(bench_span_mask.proof, mask, tokens, row_ids)


def _compiled(impl: str, function: Callable, settings: Settings) -> Callable:
    """The function, of `COMPILED` by `torch.compile`; without code generation in a rehearsal."""
    if impl != COMPILED:
        return function
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
