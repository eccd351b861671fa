"""Cross-entropy, forward and backward: from hidden states as the trainer calls it, and from logits.

A step of 4,096 tokens labels all of them (CLM) or 30 or 15 % (MLM); the model passes only labeled rows, so N
counts those, and every implementation gets the same. Like the trainer with mixed precision, on a GPU and on a CPU:
hidden states in bf16, weight and bias in fp32, matrix products under autocast to bf16, gradients in each input's dtype.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from benchmarks import machine, peers
from benchmarks.measurement import BASELINE, COMPILED, Measurement
from kernels import cross_entropy_from_logits, masked_cross_entropy
from kernels.linear import Packed
from kernels.masked_cross_entropy import reference
from kernels.numerics import Comparison, compare

MODELS = {"small": (384, 8192), "base": (768, 16384), "base, vocabulary of 32,768": (768, 32768)}
Z_LOSS_WEIGHT = 0.1  # large, so that the proof detects a missing z-loss; costs no time
PROOF_ROWS = 614  # more than one chunk of every implementation at V ≥ 8192, for every timed shape

Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Shape:
    """N labeled rows [D], V classes."""

    N: int
    D: int
    V: int

    def __str__(self) -> str:
        return f"N={self.N} D={self.D} V={self.V}"


@dataclass(frozen=True)
class Implementation:
    """A loss of (hidden, weight, labels, bias, z_loss_weight), summed over rows, and what it does not compute.

    Attributes:
        loss: of the sums.
        has_bias: whether it adds a bias.
        has_z_loss: whether it has the weight of logsumexp².
        is_packed: whether its weight is `Inputs.packed`, as the trainer passes it on GPUs.
    """

    loss: Loss
    has_bias: bool = True
    has_z_loss: bool = True
    is_packed: bool = False


SHAPES = [Shape(rows, *model) for model in MODELS.values() for rows in (4096, 1229, 614)]
LOGITS_SHAPES = [Shape(4096 if machine.device().type == "cuda" else 614, *model) for model in MODELS.values()]
TINY = Shape(24, 16, 131)


def _reference(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, z_loss_weight: float) -> Tensor:
    return reference.masked_cross_entropy(hidden, weight, labels, bias, z_loss_weight=z_loss_weight).total


def _ours(
    hidden: Tensor, weight: Tensor | Packed, labels: Tensor, bias: Tensor, z_loss_weight: float, backend: str
) -> Tensor:
    return masked_cross_entropy(hidden, weight, labels, bias, z_loss_weight=z_loss_weight, backend=backend).total


def _reference_from_logits(logits: Tensor, labels: Tensor, z_loss_weight: float) -> Tensor:
    return reference.cross_entropy_from_logits(logits, labels, z_loss_weight=z_loss_weight).total


def _ours_from_logits(logits: Tensor, labels: Tensor, z_loss_weight: float, backend: str) -> Tensor:
    return cross_entropy_from_logits(logits, labels, z_loss_weight=z_loss_weight, backend=backend).total


IMPLEMENTATIONS = {
    BASELINE: Implementation(_reference),
    COMPILED: Implementation(_reference),
    "torch": Implementation(functools.partial(_ours, backend="torch")),
    "triton": Implementation(functools.partial(_ours, backend="triton")),
    "triton_packed": Implementation(functools.partial(_ours, backend="triton"), is_packed=True),
    "cpp": Implementation(functools.partial(_ours, backend="cpp")),
    "linear_cross_entropy": Implementation(peers.linear_cross_entropy, has_z_loss=False),
    "linear_cross_entropy_chunked": Implementation(
        peers.chunked_linear_cross_entropy, has_bias=False, has_z_loss=False
    ),
    "liger": Implementation(peers.liger),
    "cut_cross_entropy": Implementation(peers.cut_cross_entropy, has_bias=False, has_z_loss=False),
}
FROM_LOGITS = {
    BASELINE: _reference_from_logits,
    COMPILED: _reference_from_logits,
    "torch": functools.partial(_ours_from_logits, backend="torch"),
    "triton": functools.partial(_ours_from_logits, backend="triton"),
    "cpp": functools.partial(_ours_from_logits, backend="cpp"),
    "liger": peers.liger_from_logits,
}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_masked_cross_entropy(measurement: Measurement, impl: str, shape: Shape) -> None:
    """From hidden states."""
    if measurement.enabled and machine.device().type == "cpu":
        _skip_what_takes_minutes(impl, shape)
    shape = shape if measurement.enabled else TINY
    implementation = IMPLEMENTATIONS[impl]
    implementation = replace(implementation, loss=measurement.compiled(implementation.loss))
    measurement.prove(hidden_proof(implementation, shape))
    inputs = make_inputs(shape.N, shape.D, shape.V)
    measurement.time(
        lambda: gradients_of(implementation, inputs), lambda: gradients_of(IMPLEMENTATIONS[BASELINE], inputs)
    )


@pytest.mark.parametrize("impl", FROM_LOGITS)
@pytest.mark.parametrize("shape", LOGITS_SHAPES, ids=str)
def test_cross_entropy_from_logits(measurement: Measurement, impl: str, shape: Shape) -> None:
    """From logits in bf16; bytes by the formula of the operation's README."""
    shape = shape if measurement.enabled else TINY
    loss = measurement.compiled(FROM_LOGITS[impl])
    measurement.prove(logits_proof(loss, shape.V))
    logits, labels = make_logits(shape.N, shape.V)
    on_gpu = machine.device().type == "cuda"  # where memory is the limit
    fewest_bytes = shape.N * (2 * shape.V * logits.itemsize + 8 + 12) if on_gpu else None
    measurement.time(
        lambda: logits_gradient(loss, logits, labels),
        lambda: logits_gradient(_reference_from_logits, logits, labels),
        fewest_bytes,
    )


def _skip_what_takes_minutes(impl: str, shape: Shape) -> None:
    """On CPUs."""
    if impl == "linear_cross_entropy_chunked":
        pytest.skip("on CPUs it multiplies in fp32: some ten times as long as linear_cross_entropy")
    if shape.N == 4096 and shape.V == 32768:
        pytest.skip("the user's vocabulary with 4,096 labels takes minutes on a CPU; 1,229 labels show the same")


@dataclass(frozen=True)
class Inputs:
    """The head's inputs: hidden [N, D] in bf16, weight [V, D] and bias [V] in fp32, labels [N]."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    labels: Tensor

    @functools.cached_property
    def packed(self) -> Packed:
        """The weight with a copy in bf16, and with memory that its gradient overwrites."""
        return Packed((self.weight,), self.weight.detach().bfloat16(), torch.empty_like(self.weight), overwrites=True)


def make_inputs(rows: int, hidden_size: int, vocab_size: int) -> Inputs:
    """Random inputs on the device; weight and bias are exact in bf16, so that autocast rounds nothing."""
    generator = machine.generator(vocab_size)
    randn = functools.partial(torch.randn, generator=generator, device=generator.device)
    hidden = randn(rows, hidden_size)
    weight = hidden_size**-0.5 * randn(vocab_size, hidden_size)
    bias = randn(vocab_size)
    labels = torch.randint(vocab_size, (rows,), generator=generator, device=generator.device)
    return Inputs(
        _dynamic_rows(hidden.bfloat16()).requires_grad_(),
        weight.bfloat16().float().requires_grad_(),
        bias.bfloat16().float().requires_grad_(),
        _dynamic_rows(labels),
    )


def make_logits(rows: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Random logits [N, V] in bf16 and labels [N] on the device."""
    generator = machine.generator(vocab_size)
    logits = 3 * torch.randn(rows, vocab_size, generator=generator, device=generator.device)
    labels = torch.randint(vocab_size, (rows,), generator=generator, device=generator.device)
    return _dynamic_rows(logits.bfloat16()).requires_grad_(), _dynamic_rows(labels)


def _dynamic_rows(tensor: Tensor) -> Tensor:
    """Have torch.compile generate code for any number of rows, as it differs from step to step in training."""
    torch._dynamo.mark_dynamic(tensor, 0)  # noqa: SLF001 - the only name that it has
    return tensor


def gradients_of(
    implementation: Implementation, inputs: Inputs, z_loss_weight: float = Z_LOSS_WEIGHT, *, autocast: bool = True
) -> tuple[Tensor, ...]:
    """The total and its gradients with respect to hidden, weight and bias."""
    weight = inputs.packed if implementation.is_packed else inputs.weight
    bias = inputs.bias if implementation.has_bias else None
    z_loss_weight = z_loss_weight if implementation.has_z_loss else 0.0
    with torch.autocast(inputs.hidden.device.type, torch.bfloat16, enabled=autocast):
        total = implementation.loss(inputs.hidden, weight, inputs.labels, bias, z_loss_weight)
    wanted = [inputs.hidden] + ([] if implementation.is_packed else [inputs.weight]) + ([] if bias is None else [bias])
    grad_hidden, *others = torch.autograd.grad(total, wanted)
    if implementation.is_packed:
        others.insert(0, inputs.packed.gradient)
    return total.detach(), grad_hidden, *others


def logits_gradient(loss: Loss, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The total and its gradient."""
    total = loss(logits, labels, Z_LOSS_WEIGHT)
    return total.detach(), *torch.autograd.grad(total, logits)


def hidden_proof(implementation: Implementation, shape: Shape) -> Iterator[Comparison]:
    """The loss and its gradients against the fp64 reference, at this D and V."""
    inputs, exact, plain = _expected(shape.D, shape.V, implementation.has_bias, implementation.has_z_loss)
    actual = gradients_of(implementation, inputs)
    never_label = ~torch.isin(torch.arange(shape.V, device=inputs.labels.device), inputs.labels)
    off_target = {"weight": never_label[:, None], "bias": never_label}
    for name, *tensors in zip(("total", "hidden", "weight", "bias"), actual, exact, plain, strict=False):
        yield from _compare(f"{name} at D={shape.D} V={shape.V}", *tensors, off_target.get(name))


@functools.lru_cache(maxsize=2)
def _expected(
    hidden_size: int, vocab_size: int, has_bias: bool, has_z_loss: bool
) -> tuple[Inputs, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Inputs with some rows ignored, and their gradients in fp64 and by plain PyTorch as the trainer would."""
    inputs = make_inputs(PROOF_ROWS, hidden_size, vocab_size)
    inputs.labels[::7] = -100
    wide = [tensor.detach().double().requires_grad_() for tensor in (inputs.hidden, inputs.weight, inputs.bias)]
    expected = Implementation(_reference, has_bias, has_z_loss)
    exact = gradients_of(expected, Inputs(*wide, inputs.labels), autocast=False)
    return inputs, exact, gradients_of(expected, inputs)


def logits_proof(loss: Loss, vocab_size: int) -> Iterator[Comparison]:
    """`loss` and its gradient against the fp64 reference, at this V."""
    logits, labels = make_logits(PROOF_ROWS, vocab_size)
    labels[::7] = -100
    off_target = torch.arange(vocab_size, device=labels.device) != labels[:, None]
    exact = logits_gradient(_reference_from_logits, logits.detach().double().requires_grad_(), labels)
    plain = logits_gradient(_reference_from_logits, logits, labels)
    actual = logits_gradient(loss, logits, labels)  # last, because Liger-Kernel's overwrites the logits
    for name, off, *tensors in zip(("total", "logits"), (None, off_target), actual, exact, plain, strict=True):
        yield from _compare(f"{name} at V={vocab_size}", *tensors, off)


def _compare(
    name: str, actual: Tensor, exact: Tensor, plain: Tensor, off_target: Tensor | None
) -> Iterator[Comparison]:
    """The tolerance rule; for a peer that returns its total in bf16, in bf16's precision."""
    yield from compare(name, actual, exact, plain.to(actual.dtype), off_target)
