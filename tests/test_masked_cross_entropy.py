"""Masked cross-entropy against an independent fp64 computation, and bugs that the tolerance must reject."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import cross_entropy_from_logits, masked_cross_entropy
from tests.numerics import assert_accurate

IGNORED = -100
Z_WEIGHT = 0.1  # large, so that a z-loss that is missing somewhere shows even in bf16
DIM = 32


@dataclass
class Case:
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor

    @property
    def inputs(self):
        return {name: tensor for name, tensor in vars(self).items() if name != "labels" and tensor is not None}

    def to(self, dtype):
        return replace(
            self, **{name: tensor.detach().to(dtype).requires_grad_() for name, tensor in self.inputs.items()}
        )

    def gradients(self):
        return {name: tensor.grad for name, tensor in self.inputs.items()}


def make_case(rows, vocab, dtype, *, ignored=0.4, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(vocab, (rows,), generator=generator)
    labels = torch.where(torch.rand(rows, generator=generator) < ignored, IGNORED, labels)
    if rows > 2 and ignored < 1:
        labels[2] = vocab - 1
    case = Case(
        torch.randn(rows, DIM, generator=generator),
        torch.randn(vocab, DIM, generator=generator) * 0.3,
        torch.randn(vocab, generator=generator) if bias else None,
        labels,
    )
    if bias:
        case.bias[-1] = 4.0  # the last class is likely, so that its absence shows
    return case.to(dtype)


def expected_sums(logits, labels, z_weight):
    """The definition, in the precision of `logits`: total, loss, z_loss."""
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    z_loss = logits.logsumexp(-1)[labels != IGNORED].square().sum()
    return loss + z_weight * z_loss, loss, z_loss


def run_expected(case, dtype, z_weight, scale):
    case = case.to(dtype)
    logits = F.linear(case.hidden, case.weight, case.bias)
    logits = logits if dtype == torch.float64 else logits.float()
    sums = expected_sums(logits, case.labels, z_weight)
    (sums[0] * scale).backward()
    return sums, case.gradients()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("vocab", [131, 1009])
@pytest.mark.parametrize("rows", [1, 3, 127])
@pytest.mark.parametrize("ignored", [0.0, 0.4])
@pytest.mark.parametrize("bias", [True, False])
def test_sums_and_all_gradients_are_accurate(backend, dtype, vocab, rows, ignored, bias):
    case = make_case(rows, vocab, dtype, ignored=ignored, bias=bias)
    result = masked_cross_entropy(
        case.hidden, case.weight, case.labels, case.bias, z_loss_weight=Z_WEIGHT, backend=backend
    )
    (result.total * 3).backward()  # grad_output is honoured
    reference, reference_gradients = run_expected(case, torch.float64, Z_WEIGHT, 3)
    plain, plain_gradients = run_expected(case, dtype, Z_WEIGHT, 3)
    for name, actual, exact, rough in zip(("total", "loss", "z_loss"), result[:3], reference, plain, strict=True):
        assert_accurate(actual.detach(), exact.detach(), rough.detach(), name=name)
    no_label = torch.ones(vocab, dtype=torch.bool)
    no_label[case.labels[case.labels != IGNORED]] = False
    off_target = {"hidden": None, "weight": no_label[:, None], "bias": no_label}
    for name, gradient in case.gradients().items():
        assert_accurate(gradient, reference_gradients[name], plain_gradients[name], off_target[name], name)


@pytest.mark.parametrize("ignore_index", [-100, -1, 5])
def test_integers_are_exact_and_detached(backend, ignore_index):
    logits = torch.randn(500, 11, generator=torch.Generator().manual_seed(1), requires_grad=True)
    labels = torch.randint(11, (500,), generator=torch.Generator().manual_seed(2))
    labels[::3] = ignore_index
    result = cross_entropy_from_logits(logits, labels, ignore_index=ignore_index, backend=backend)
    kept = [row for row in range(500) if labels[row] != ignore_index]
    hits = sum(max(range(11), key=logits[row].tolist().__getitem__) == labels[row] for row in kept)
    assert (result.count.item(), result.correct.item()) == (len(kept), hits)
    assert 0 < hits < len(kept)
    assert result.count.dtype == result.correct.dtype == torch.int64
    assert result.total.dtype == result.loss.dtype == result.z_loss.dtype == torch.float32
    assert result.total.requires_grad
    assert not any(tensor.requires_grad for tensor in result[1:])
    assert all(tensor.shape == () for tensor in result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_without_labels_the_loss_is_zero_and_touches_every_input(backend, dtype, rows):
    case = make_case(rows, 131, dtype, ignored=1.1)
    result = masked_cross_entropy(
        case.hidden, case.weight, case.labels, case.bias, z_loss_weight=Z_WEIGHT, backend=backend
    )
    result.total.backward()
    assert [tensor.item() for tensor in result] == [0, 0, 0, 0, 0]
    for tensor in case.inputs.values():
        assert tensor.grad is not None
        assert tensor.grad.shape == tensor.shape
        assert (tensor.grad == 0).all()


def test_ignored_rows_change_nothing(backend):
    case = make_case(64, 131, torch.float32)
    logits = F.linear(case.hidden, case.weight, case.bias).detach()
    kept = case.labels != IGNORED
    extreme = logits.clone()
    extreme[~kept] = torch.tensor([1e30, -1e30]).repeat(66)[:131]

    def run(logits, labels):
        logits = logits.clone().requires_grad_()
        result = cross_entropy_from_logits(logits, labels, z_loss_weight=Z_WEIGHT, backend=backend)
        result.total.backward()
        return result, logits.grad

    result, gradient = run(extreme, case.labels)
    alone, gradient_alone = run(logits[kept], case.labels[kept])
    torch.testing.assert_close(result, alone, rtol=1e-6, atol=0)
    assert (result.correct, result.count) == (alone.correct, alone.count)
    torch.testing.assert_close(gradient[kept], gradient_alone, rtol=1e-6, atol=1e-9)
    assert (gradient[~kept] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_extreme_logits_stay_finite(backend, dtype):
    logits = torch.tensor([[3e4, -3e4, 0.0], [-3e4, -3e4, -3e4], [1e-8, 0.0, 80.0]], dtype=dtype, requires_grad=True)
    labels = torch.tensor([1, 2, 2])
    result = cross_entropy_from_logits(logits, labels, z_loss_weight=1e-4, backend=backend)
    result.total.backward()
    exact = expected_sums(logits.detach().double(), labels, 1e-4)
    for actual, expected in zip(result[:3], exact, strict=True):
        assert actual.item() == pytest.approx(expected.item(), rel=1e-6)
    assert logits.grad.isfinite().all()


def test_confident_predictions_keep_their_small_loss(backend):
    """The loss is e^−12 a row, less than one rounding of the logits: lse − logit would lose it."""
    logits = torch.tensor([100.0, 112.0]).repeat(4, 1)
    result = cross_entropy_from_logits(logits, torch.ones(4, dtype=torch.long), backend=backend)
    exact = expected_sums(logits.double(), torch.ones(4, dtype=torch.long), 0)[1]
    assert result.loss.item() == pytest.approx(exact.item(), rel=2e-2)


def test_z_loss_gradient_is_the_formula(backend):
    logits = torch.randn(7, 19, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 18, IGNORED, 3, 4, 5, IGNORED])
    cross_entropy_from_logits(logits, labels, z_loss_weight=0.3, backend=backend).total.backward()
    with torch.no_grad():
        lse = logits.logsumexp(-1, keepdim=True)
        onehot = F.one_hot(labels.clamp(min=0), 19)
        formula = (logits.softmax(-1) * (1 + 2 * 0.3 * lse) - onehot) * (labels != IGNORED)[:, None]
    torch.testing.assert_close(logits.grad, formula, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("label", [131, -1, -99])
def test_labels_outside_the_vocabulary_raise(backend, label):
    case = make_case(4, 131, torch.float32, ignored=0)
    case.labels[2] = label
    with pytest.raises(RuntimeError):
        masked_cross_entropy(case.hidden, case.weight, case.labels, case.bias, backend=backend)


def test_labels_may_be_int32_and_inputs_are_left_alone(backend):
    case = make_case(33, 131, torch.float32)
    before = [tensor.detach().clone() for tensor in (*case.inputs.values(), case.labels)]
    long = masked_cross_entropy(case.hidden, case.weight, case.labels, case.bias, backend=backend)
    short = masked_cross_entropy(case.hidden, case.weight, case.labels.int(), case.bias, backend=backend)
    assert all(torch.equal(one, other) for one, other in zip(long, short, strict=True))
    assert all(torch.equal(*pair) for pair in zip(before, (*case.inputs.values(), case.labels), strict=True))


def test_unknown_backend_is_an_error(monkeypatch):
    case = make_case(4, 131, torch.float32)
    with pytest.raises(ValueError, match="backend='cuda'"):
        masked_cross_entropy(case.hidden, case.weight, case.labels, backend="cuda")
    monkeypatch.setenv("KERNELS_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="KERNELS_BACKEND='nonsense'"):
        masked_cross_entropy(case.hidden, case.weight, case.labels)


def ignored_mask_forgotten(logits, labels):
    return gradient_of(logits, torch.where(labels == IGNORED, 0, labels))


def last_class_forgotten(logits, labels):
    """Only in the softmax: the target entries of the last class stay right."""
    gradient = gradient_of(logits, labels)
    smaller = F.pad(gradient_of(logits[:, :-1], torch.where(labels == logits.shape[1] - 1, 0, labels)), (0, 1))
    return torch.where(torch.arange(logits.shape[1]) == labels[:, None], gradient, smaller)


def off_target_forgotten(logits, labels):
    onehot = F.one_hot(labels.clamp(min=0), logits.shape[1])
    return gradient_of(logits, labels) * onehot


def gradient_of(logits, labels, z_weight=Z_WEIGHT):
    logits = logits.detach().float().requires_grad_()
    expected_sums(logits, labels, z_weight)[0].backward()
    return logits.grad


PLANTED = {
    "zero gradient": lambda logits, labels: torch.zeros_like(logits),
    "off-target gradients zero": off_target_forgotten,
    "dropped scale": lambda logits, labels: gradient_of(logits, labels) / 3,
    "z-loss left out": lambda logits, labels: gradient_of(logits, labels, 0.0),
    "ignored mask forgotten": ignored_mask_forgotten,
    "last class forgotten": last_class_forgotten,
    "not a number": lambda logits, labels: gradient_of(logits, labels).index_fill(0, torch.tensor([5]), torch.nan),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("vocab", [131, 1009])
@pytest.mark.parametrize("bug", [None, *PLANTED])
def test_the_tolerance_rejects_planted_bugs(backend, bug, vocab, dtype):
    case = make_case(127, vocab, dtype)
    logits = F.linear(case.hidden, case.weight, case.bias).detach()

    def gradient(dtype, function):
        copy = logits.to(dtype).requires_grad_()
        function(copy).backward()
        return copy.grad

    reference = gradient(torch.float64, lambda x: expected_sums(x, case.labels, Z_WEIGHT)[0])
    plain = gradient(dtype, lambda x: expected_sums(x.float(), case.labels, Z_WEIGHT)[0])
    off_target = torch.arange(vocab) != case.labels[:, None]
    if bug is None:
        run = lambda x: cross_entropy_from_logits(x, case.labels, z_loss_weight=Z_WEIGHT, backend=backend).total  # noqa: E731
        assert_accurate(gradient(dtype, run), reference, plain, off_target)
        return
    with pytest.raises(AssertionError):
        assert_accurate(PLANTED[bug](logits, case.labels).to(dtype), reference, plain, off_target)
