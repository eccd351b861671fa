"""gated_norm against its reference: the operation with its gradients, and the kernels alone."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.gated_norm import cpp, gated_norm, reference
from kernels.numerics import Comparison, compare, compare_function
from kernels.run import Run

_EPS = 1e-5


def comparisons(device: torch.device, backend: str, run: Run | None = None) -> Iterator[Comparison]:
    """Forward and backward in bf16, with both forms of GELU, at odd sizes; always on the CPU."""
    del device, run
    for size in (3, 40, 1280) if backend == "cpp" else ():
        for with_linear in (False, True):
            yield from _kernels(size, with_linear=with_linear)
    weight = _random(12, 40).float() / 4
    separate = {"gate": _random(3, 5, 40), "linear": _random(4, 3, 5, 10), "weight": weight}
    yield from _operation("tanh", {"gate": _random(3, 5, 80), "weight": weight}, backend)
    yield from _operation("none", separate, backend)


def _random(*shape: int) -> Tensor:
    """bf16; a function of the shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


def _compare_all(names: str, *results: tuple[Tensor, ...]) -> Iterator[Comparison]:
    """Named results of the kernel, the fp64 reference and plain PyTorch in the kernel's precision."""
    for name, *tensors in zip(names.split(", "), *results, strict=True):
        yield from compare(name, *tensors)


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
        gate, linear = _random(3, 5, 4 * size + 3)[..., 3:], _random(4, 3, 5, size)
    else:
        gate, linear = _random(3, 5, 2 * size + 3)[..., 3:], None
    inputs = [gate] if linear is None else [gate, linear]
    width = gate.shape[-1] if with_linear else size
    grad = _random(3, 5, width)

    def formula(gate: Tensor, linear: Tensor | None = None) -> Tensor:
        if linear is None:
            linear, gate = gate.chunk(2, dim=-1)
        else:
            linear = linear.permute(1, 2, 0, 3).flatten(2)
        product = linear * F.gelu(gate, approximate=approximate)
        return F.layer_norm(product, (width,), eps=_EPS)

    results = []
    for convert in (Tensor.double, Tensor.float):
        leaves = [convert(tensor).requires_grad_() for tensor in inputs]
        normalized = formula(*leaves)
        gradients = torch.autograd.grad(normalized, leaves, convert(grad))
        results.append([normalized.detach(), *gradients])
    exact, plain = results[0], [tensor.bfloat16() for tensor in results[1]]
    normalized, mean, inverse_std = cpp.gated_norm(gate, linear, not with_linear, _EPS)
    of_gate, of_linear, again = cpp.gated_norm_backward(grad, gate, linear, mean, inverse_std, not with_linear)
    actual = [normalized, of_gate, of_linear][: 1 + len(inputs)]
    yield from compare(f"{name}: normalized again", again, exact[0], plain[0])
    names = ", ".join(f"{name}: {part}" for part in ("normalized", "∂gate", "∂linear")[: 1 + len(inputs)])
    yield from _compare_all(names, actual, exact, plain)
