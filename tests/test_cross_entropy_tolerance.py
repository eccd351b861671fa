"""Bugs that the tolerance of cross-entropy's checks must reject."""

import pytest
import torch
import torch.nn.functional as F

from kernels import cross_entropy_from_logits
from tests.numerics import assert_accurate
from tests.test_masked_cross_entropy import IGNORED, Z_WEIGHT, expected_sums, make_case


def ignored_mask_forgotten(logits, labels):
    return gradient_of(logits, torch.where(labels == IGNORED, 0, labels))


def last_class_forgotten(logits, labels):
    """Only in the softmax: the last class's target entries stay correct."""
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
