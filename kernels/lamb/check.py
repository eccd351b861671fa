"""LAMB against its reference on this device, in every combination of dtypes and alignments with code of its own."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from kernels.lamb import PreparedStep, lamb_step, reference
from kernels.lamb.arguments import Clipping, Settings, Tensors
from kernels.numerics import Comparison, compare, compare_exactly
from kernels.run import Run

# Several chunks with and without decay, sizes around a block's, zero parameters, a few elements, empty tensors.
_SHAPES = ((40_001,), (2048,), (0,), (4097,), (127, 1), (3,), (1,), (150, 137))
_DECAYS = (0.1, 0.3, 0.1, 0.1, 0.0, 0.1, 0.0, 0.0)
_SIZES = (0.03, 3.0, 1.0, 0.2, 0.1, 0.0, 1.0, 0.01)  # of the parameters
_HAS_COPY = (True, False, True, True, True, False, True, True)
_AGES = (0, 1, 3, 2, 10, 500, 99_999, 0)
_LR = 0.5
_SETTINGS: dict[str, Any] = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-6}
_AVERAGE_DECAY = 0.99
_GUARD = 16  # elements around a tensor that must not be written


@dataclass(frozen=True)
class _Case:
    name: str
    grad_type: torch.dtype = torch.float32
    moment_type: torch.dtype = torch.float32
    grad_offset: int = 0  # elements from 16-byte alignment
    offset: int = 0
    max_grad_norm: float | None = 2.0
    averages: bool = True
    copy_type: torch.dtype | None = None  # of some parameters; written by the backend triton alone
    device_lr: bool = False


_CASES = (
    _Case("fp32", copy_type=torch.bfloat16),
    _Case("unaligned gradients, not clipped", grad_offset=1, max_grad_norm=None, copy_type=torch.float32),
    _Case("unaligned, too short to clip", grad_offset=3, offset=1, max_grad_norm=1e6, copy_type=torch.bfloat16),
    _Case("bf16 gradients, no averages, lr on the device", torch.bfloat16, averages=False, device_lr=True),
    _Case("bf16 moments", moment_type=torch.bfloat16),
    _Case("bf16 unaligned", torch.bfloat16, torch.bfloat16, grad_offset=3, offset=1, copy_type=torch.bfloat16),
)
_SKIPPED = (
    (_Case("a NaN in fp32"), math.nan),
    (
        _Case("an infinity in bf16", torch.bfloat16, torch.bfloat16, grad_offset=3, offset=1, copy_type=torch.bfloat16),
        -math.inf,
    ),
)


def comparisons(device: torch.device, backend: str, run: Run | None = None) -> Iterator[Comparison]:
    """Skipped steps, rounded moments to the bit, and a step of each case; for a run, only what it launches."""
    if run is not None:
        copy_type = run.logits_type if run.gates and run.gates[1] else None  # then the blocks' weights are packed
        grad_offsets = {"fp32": 0} | ({"unaligned gradients": 1} if run.buckets else {})
        for name, grad_offset in grad_offsets.items():
            yield from _compare_step(_Case(name, grad_offset=grad_offset, copy_type=copy_type), device, backend)
        # without copies: a sharded run has none, nor one that must do without fused gated norms
        yield from _compare_skipped(*_SKIPPED[0], device, backend)
        return
    for case, bad in _SKIPPED:
        yield from _compare_skipped(case, bad, device, backend)
    for seed in (None, 2**40 + 5):
        yield from _compare_rounding(seed, device, backend)
    for case in _CASES:
        yield from _compare_step(case, device, backend)


class _Model:
    """A model's tensors before a step, with guard elements around each; the same at every call."""

    def __init__(self, case: _Case, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self._guards: list[Tensor] = []
        self.params, self.grads, self.exp_avgs, self.exp_avg_sqs, self.averages = ([] for _ in range(5))
        for shape, size, age in zip(_SHAPES, _SIZES, _AGES, strict=True):
            param, grad, exp_avg, exp_avg_sq, average = (torch.randn(shape, generator=generator) for _ in range(5))
            is_old = min(age, 1)  # moments as after some steps; zeros before the first
            self.params.append(self._place(size * param, device, torch.float32, case.offset))
            self.grads.append(self._place(grad, device, case.grad_type, case.grad_offset))
            self.exp_avgs.append(self._place(0.3 * is_old * exp_avg, device, case.moment_type, case.offset))
            self.exp_avg_sqs.append(self._place(is_old * exp_avg_sq.square(), device, case.moment_type, case.offset))
            self.averages.append(self._place(size * average, device, torch.float32, case.offset))
        self.steps = [torch.tensor(float(age), device=device) for age in _AGES]
        # not yet like their parameters, so that a skipped step's would show
        self.copies = [
            self._place(7 * torch.ones(shape), device, case.copy_type, case.offset)
            if has_copy and case.copy_type
            else None
            for shape, has_copy in zip(_SHAPES, _HAS_COPY, strict=True)
        ]

    def _place(self, values: Tensor, device: torch.device, dtype: torch.dtype, offset: int) -> Tensor:
        memory = torch.full((values.numel() + 2 * _GUARD + offset,), 7.0, dtype=dtype, device=device)
        start, end = _GUARD + offset, _GUARD + offset + values.numel()
        self._guards += [memory[:start], memory[end:]]
        return memory[start:end].copy_(values.flatten()).view(values.shape)

    def written(self) -> dict[str, list[Tensor]]:
        names = ("params", "exp_avgs", "exp_avg_sqs", "averages")
        return {name: getattr(self, name) for name in names}

    def written_copies(self) -> list[Tensor]:
        return [copy for copy in self.copies if copy is not None]

    def left_alone(self) -> Tensor:
        return torch.cat(list(map(_flat, (*self._guards, *self.grads))))

    def widen(self) -> None:
        for tensors in (*self.written().values(), self.grads):
            tensors[:] = [tensor.double() for tensor in tensors]


def _compare_step(case: _Case, device: torch.device, backend: str) -> Iterator[Comparison]:
    """All outputs of a step; that guards and gradients are unchanged; that a repetition gives the same bits.

    Copies have the bits of the new parameters, rounded by PyTorch.
    """
    before, actual, again, exact, plain = (_Model(case, device) for _ in range(5))
    exact.widen()
    norm = _step(actual, case, backend)
    exact_norm, plain_norm = (_reference_step(model, case) for model in (exact, plain))
    for name, tensors in actual.written().items():
        each = zip(tensors, exact.written()[name], plain.written()[name], strict=True)
        yield _worst(result for triple in each for result in compare(f"{case.name}: {name}", *triple))
    yield compare_exactly(f"{case.name}: steps", torch.stack(actual.steps), torch.stack(plain.steps))
    if _writes_copies(case, backend):
        rounded = [param.to(case.copy_type) for param, has in zip(actual.params, _HAS_COPY, strict=True) if has]
        yield compare_exactly(f"{case.name}: copies", _bits_of(actual.written_copies()), _bits_of(rounded))
    yield compare_exactly(f"{case.name}: memory to leave alone", actual.left_alone(), before.left_alone())
    norm_again = _step(again, case, backend)
    if norm is not None:
        yield from compare(f"{case.name}: gradient norm", norm, exact_norm, plain_norm)
        yield compare_exactly(f"{case.name}: gradient norm again", norm_again, norm)
    yield compare_exactly(f"{case.name}: again", _bits(again), _bits(actual))


def _compare_skipped(case: _Case, bad: float, device: torch.device, backend: str) -> Iterator[Comparison]:
    """One entry of one gradient is not finite: neither is the norm, and all state stays bit-identical."""
    before, actual = (_Model(case, device) for _ in range(2))
    actual.grads[3][5] = bad
    norm = _step(actual, case, backend)
    yield compare_exactly(
        f"{case.name}: norm that is finite", norm.isfinite(), torch.zeros_like(norm, dtype=torch.bool)
    )
    yield compare_exactly(f"{case.name}: skipped", _bits(actual), _bits(before))


def _bits(model: _Model) -> Tensor:
    return _bits_of(chain(*model.written().values(), model.steps, model.written_copies()))


def _bits_of(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat(list(map(_flat, tensors))).view(torch.int32)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.flatten().float()


def _writes_copies(case: _Case, backend: str) -> bool:
    return case.copy_type is not None and backend == "triton"


def _step(model: _Model, case: _Case, backend: str) -> Tensor | None:
    averages = model.averages if case.averages else []
    settings: dict[str, Any] = {
        "lr": torch.tensor(_LR, device=model.params[0].device) if case.device_lr else _LR,
        "max_grad_norm": case.max_grad_norm,
        "average_decay": _AVERAGE_DECAY,
        **_SETTINGS,
    }
    state = (model.exp_avgs, model.exp_avg_sqs, model.steps)
    if _writes_copies(case, backend):
        return PreparedStep(model.params, *state, averages, _DECAYS, model.copies)(model.grads, **settings)
    return lamb_step(
        model.params, model.grads, *state, averages=averages, weight_decay=_DECAYS, backend=backend, **settings
    )


def _reference_step(model: _Model, case: _Case) -> Tensor | None:
    norm = None if case.max_grad_norm is None else torch.empty_like(model.params[0][0])
    averages = model.averages if case.averages else []
    reference.lamb_step(
        Tensors(model.params, model.grads, model.exp_avgs, model.exp_avg_sqs, model.steps, averages),
        Clipping(case.max_grad_norm, norm),
        Settings(lr=_LR, weight_decays=list(_DECAYS), average_decay=_AVERAGE_DECAY, **_SETTINGS),
    )
    return norm


def _compare_rounding(seed: int | None, device: torch.device, backend: str) -> Iterator[Comparison]:
    """Moments that are exact in fp32 in any order of operations, so that only their rounding to bf16 is compared."""
    generator = torch.Generator().manual_seed(1)
    numbers = [torch.randint(-256, 256, (size,), generator=generator).to(device) for size in (20_000, 99)]
    results = []
    for name in (backend, "torch"):
        params = [torch.ones(number.shape, device=device) for number in numbers]
        exp_avgs, exp_avg_sqs = ([torch.zeros_like(param, dtype=torch.bfloat16) for param in params] for _ in range(2))
        lamb_step(
            params,
            [number.float() + 1 / 256 for number in numbers],
            exp_avgs,
            exp_avg_sqs,
            [torch.tensor(4.0, device=device) for _ in params],
            lr=_LR,
            beta1=0.5,
            beta2=0.5,
            eps=1.0,
            weight_decay=0.1,
            stochastic_rounding_seed=seed,
            backend=name,
        )
        results.append((exp_avgs, exp_avg_sqs))
    for name, actual, expected in zip(("exp_avgs", "exp_avg_sqs"), *results, strict=True):
        yield compare_exactly(f"rounded with seed {seed}: {name}", torch.cat(actual), torch.cat(expected))


def _worst(results: Iterator[Comparison]) -> Comparison:
    return max(results, key=lambda result: (not result.passed, result.error / result.bound if result.bound else 0.0))
