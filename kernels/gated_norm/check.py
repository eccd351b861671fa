"""gated_norm against its reference: the operation with its gradients, and the kernels alone."""

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.gated_norm import cpp, gated_norm, reference
from kernels.numerics import Comparison, compare, compare_all, compare_function, random_bf16
from kernels.run import Run

_EPS = 1e-5


def comparisons(device: torch.device, backend: str, run: Run | None = None) -> Iterator[Comparison]:
    """Forward and backward in bf16, with both forms of GELU, at odd sizes; always on the CPU."""
    del device, run
    for size in (3, 40, 1280) if backend == "cpp" else ():
        for with_linear in (False, True):
            yield from _kernels(size, with_linear=with_linear)
    weight = random_bf16(12, 40).float() / 4
    separate = {"gate": random_bf16(3, 5, 40), "linear": random_bf16(4, 3, 5, 10), "weight": weight}
    yield from _operation("tanh", {"gate": random_bf16(3, 5, 80), "weight": weight}, backend)
    yield from _operation("none", separate, backend)


def _operation(approximate: str, inputs: dict[str, Tensor], backend: str) -> Iterator[Comparison]:
    """As in training: fp32 weight, autocast to bf16."""
    rest = {"approximate": approximate, "eps": _EPS}

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
