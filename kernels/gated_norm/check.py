"""gated_norm against its reference: the operation with its gradients, and the kernels alone."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kernels.backend import triton_kernel
from kernels.gated_norm import cpp, gated_norm, op, reference
from kernels.linear import Packed
from kernels.numerics import Comparison, checked_dtypes, compare, compare_all, compare_function, random_bf16
from kernels.run import Run

_EPS = 1e-5


def comparisons(device: torch.device, backend: str, run: Run | None = None) -> Iterator[Comparison]:
    """Forward and backward, with both forms of GELU, at odd sizes.

    Args:
        device: where the Triton kernels run; the others run on the CPU.
        backend: the implementation to compare with the reference; see `kernels.backend`.
        run: check the Triton kernels only for this run's sizes; None checks several.
    """
    if backend == "triton":
        yield from _fused_kernels(device, run)
        return
    for size in (3, 40, 1280) if backend == "cpp" else ():
        for with_linear in (False, True):
            yield from _kernels(size, with_linear=with_linear)
    weight = random_bf16(12, 40).float() / 4
    separate = {"gate": random_bf16(3, 5, 40), "linear": random_bf16(4, 3, 5, 10), "weight": weight}
    yield from _operation("tanh", {"gate": random_bf16(3, 5, 80), "weight": weight}, backend)
    yield from _operation("none", separate, backend)


def _fused_kernels(device: torch.device, run: Run | None) -> Iterator[Comparison]:
    """The kernels' own list, or a run's sizes."""
    is_gpu = device.type == "cuda"  # the interpreter is slow
    if run is not None:
        (dtype,) = checked_dtypes(device, run)
        for size, is_tanh in zip(run.gates, (False, True), strict=True):
            if size is not None:
                yield from compare_fused(device, 300 if is_gpu else 3, size, dtype, is_tanh=is_tanh)
        return
    for dtype in checked_dtypes(device):
        for rows, size, is_tanh in triton_kernel("gated_norm").CHECKED:
            yield from compare_fused(device, rows, size, dtype, is_tanh=is_tanh)
        if is_gpu:
            yield from compare_fused(device, 3000, 2560, dtype, is_tanh=True)


def compare_fused(
    device: torch.device, rows: int, size: int, dtype: torch.dtype, *, is_tanh: bool
) -> Iterator[Comparison]:
    """The fused operation with all gradients; as in a model, tanh with both factors in one matrix, and erf in two."""
    rest: dict[str, Any] = {"approximate": "tanh" if is_tanh else "none", "eps": _EPS}
    weight = random_bf16(12, size, 1)[..., 0].to(device) / 4
    if is_tanh:
        inputs = {"gate": random_bf16(1, rows, 2 * size)}
    else:  # the gate in the last quarter of a projection, linear a view of [B, T, D]
        inputs = {"projection": random_bf16(1, rows, 4 * size, 2)[..., 0], "linear": random_bf16(1, rows, size)}
    inputs = {name: tensor.to(device, dtype) for name, tensor in inputs.items()} | {"weight": weight.float()}

    def factors(inputs: dict[str, Tensor]) -> dict[str, Any]:
        if is_tanh:
            return {"gate": inputs["gate"], "linear": None}
        linear = inputs["linear"].unflatten(-1, (2, -1)).movedim(-2, 0)  # two heads
        return {"gate": inputs["projection"][..., 3 * size :], "linear": linear}

    def fused(weight: Tensor, **others: Tensor) -> Tensor:
        return op.fused_gated_norm(**factors(others), weight=Packed.of([weight], dtype), **rest)

    def by_definition(weight: Tensor, **others: Tensor) -> Tensor:
        return reference.gated_norm(**factors(others), weight=weight, **rest)

    def plain(weight: Tensor, **others: Tensor) -> Tensor:
        return by_definition(weight=weight.to(dtype), **others)

    name = f"fused {str(dtype).removeprefix('torch.')} R={rows} D={size} {'tanh' if is_tanh else 'erf'}"
    yield from compare_function(name, fused, by_definition, inputs, plain)


def _operation(approximate: str, inputs: dict[str, Tensor], backend: str) -> Iterator[Comparison]:
    """As in training: fp32 weight, autocast to bf16."""
    rest: dict[str, Any] = {"approximate": approximate, "eps": _EPS}

    def exact(gate: Tensor, weight: Tensor, linear: Tensor | None = None) -> Tensor:
        return reference.gated_norm(gate, linear, weight, **rest)

    def under_autocast(gate: Tensor, weight: Tensor, linear: Tensor | None = None) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return gated_norm(gate, linear, weight, **rest, backend=backend)

    def plain(weight: Tensor, **others: Tensor) -> Tensor:
        return exact(weight=weight.bfloat16(), **others)

    yield from compare_function(f"bf16 {approximate}", under_autocast, exact, inputs, plain)


def _kernels(size: int, *, with_linear: bool) -> Iterator[Comparison]:
    """The C++ kernels: B = 3, T = 5, the gate a slice of a wider tensor, four heads in `linear`."""
    approximate = "none" if with_linear else "tanh"
    name = f"D={size} {approximate}"
    if with_linear:
        gate, linear = random_bf16(3, 5, 4 * size + 3)[..., 3:], random_bf16(4, 3, 5, size)
    else:
        gate, linear = random_bf16(3, 5, 2 * size + 3)[..., 3:], None
    inputs, missing = ([gate], [None]) if linear is None else ([gate, linear], [])
    width = gate.shape[-1] if with_linear else size
    grad = random_bf16(3, 5, width)

    results = []
    for convert in (Tensor.double, Tensor.float):
        leaves = [convert(tensor).requires_grad_() for tensor in inputs]
        normalized = reference.normalized_product(*leaves, *missing, approximate=approximate, eps=_EPS)
        gradients = torch.autograd.grad(normalized, leaves, convert(grad))
        results.append([normalized.detach(), *gradients])
    exact, plain = results[0], [tensor.bfloat16() for tensor in results[1]]
    normalized, mean, inverse_std = cpp.gated_norm(gate, linear, not with_linear, _EPS)
    of_gate, of_linear, again = cpp.gated_norm_backward(grad, gate, linear, mean, inverse_std, not with_linear)
    actual = [normalized, of_gate, of_linear][: 1 + len(inputs)]
    yield from compare(f"{name}: normalized again", again, exact[0], plain[0])
    names = ", ".join(f"{name}: {part}" for part in ("normalized", "∂gate", "∂linear")[: 1 + len(inputs)])
    yield from compare_all(names, actual, exact, plain)
