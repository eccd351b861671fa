"""Masked cross-entropy summed in segments, each with a scale of its own."""

import pytest
import torch
import torch.nn.functional as F

from kernels import cross_entropy_from_logits, masked_cross_entropy
from kernels.masked_cross_entropy import op
from kernels.masked_cross_entropy.check import random_logits
from tests.numerics import assert_accurate, scattered

IGNORED = -100
SCALES = (0.5, 3.0, 7.0, 1e-4)  # the third segment has no rows
ROWS, VOCAB = 61, 131


@pytest.fixture
def case():
    logits, labels = random_logits(ROWS, VOCAB, torch.float32, torch.device("cpu"))
    segments = torch.tensor([0, 1, 3])[torch.randint(3, (ROWS,), generator=torch.Generator().manual_seed(7))]
    return logits, labels, segments, torch.tensor(SCALES)


def definition(logits, labels, segments, scales, z_loss_weight):
    """Total, and loss, z-loss, correct and count of each segment, from one call of PyTorch for each."""
    sums = []
    for segment in range(len(scales)):
        rows = (segments == segment) & (labels != IGNORED)
        x, y = logits[rows], labels[rows]
        loss, z_loss = F.cross_entropy(x, y, reduction="sum"), x.logsumexp(-1).square().sum()
        sums.append((loss, z_loss, (x.argmax(-1) == y).sum(), rows.sum()))
    loss, z_loss, correct, count = (torch.stack(each) for each in zip(*sums, strict=True))
    return (scales.to(loss.dtype) * (loss + z_loss_weight * z_loss)).sum(), loss, z_loss, correct, count


def run(function, logits, dtype, *arguments, grad_output=3.0):
    logits = logits.detach().to(dtype, copy=True).requires_grad_()
    result = function(logits, *arguments)
    (result[0] * grad_output).backward()
    return [tensor.detach() for tensor in result], logits.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_each_segment_has_the_sums_of_its_rows(backend, dtype, case):
    logits, labels, segments, scales = case
    logits = logits.to(dtype)

    def actual(logits):
        options = {"segments": segments, "scales": scales, "z_loss_weight": 0.1, "backend": backend}
        return cross_entropy_from_logits(logits, labels, **options)

    sums, gradient = run(actual, logits, dtype)
    exact, exact_gradient = run(lambda x: definition(x, labels, segments, scales, 0.1), logits, torch.float64)
    plain, plain_gradient = run(lambda x: definition(x.float(), labels, segments, scales, 0.1), logits, dtype)
    for name, *tensors in zip(("total", "loss", "z_loss"), sums, exact, plain, strict=False):
        assert_accurate(*tensors, name=name)
    assert [sums[3].tolist(), sums[4].tolist()] == [exact[3].tolist(), exact[4].tolist()]
    assert sums[4][2] == 0 < sums[4][[0, 1, 3]].min()
    for segment in (0, 1, 3):  # their gradients are of different sizes, so each has its own bound
        rows = segments == segment
        off_target = torch.arange(VOCAB) != labels[rows, None]
        assert_accurate(gradient[rows], exact_gradient[rows], plain_gradient[rows], off_target, f"gradient {segment}")


@pytest.mark.parametrize("chunk_rows", [7, 64])
def test_a_call_is_the_calls_of_its_segments(backend, case, chunk_rows, monkeypatch):
    monkeypatch.setattr(op, "CHUNK_BYTES", dict.fromkeys(op.CHUNK_BYTES, chunk_rows * VOCAB * 4))
    _, labels, segments, scales = case
    generator = torch.Generator().manual_seed(1)
    shapes = ((ROWS, 8), (VOCAB, 8), (VOCAB,))
    inputs = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    hidden, weight, bias = inputs
    options = {"z_loss_weight": 0.1, "backend": backend}
    together = masked_cross_entropy(hidden, weight, labels, bias, segments=segments, scales=scales, **options)
    gradients = torch.autograd.grad(together.total, inputs)
    rows_of = [segments == segment for segment in range(len(scales))]
    alone = [masked_cross_entropy(hidden[rows], weight, labels[rows], bias, **options) for rows in rows_of]
    total = sum(scale * each.total for scale, each in zip(scales, alone, strict=True))
    torch.testing.assert_close(together.total, total)
    for actual, expected in zip(together[1:], list(zip(*alone, strict=True))[1:], strict=True):
        torch.testing.assert_close(actual, torch.stack(expected))
    for actual, expected in zip(gradients, torch.autograd.grad(total, inputs), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_one_segment_is_no_segments_to_the_bit(backend, case):
    logits, labels, _, _ = case
    runs = []
    for options in ({"scale": 0.3}, {"segments": torch.zeros_like(labels), "scales": torch.tensor([0.3])}):
        own = logits.clone().requires_grad_()
        result = cross_entropy_from_logits(own, labels, z_loss_weight=0.1, backend=backend, **options)
        result.total.backward()
        runs.append([*(tensor.detach().reshape(-1) for tensor in result), own.grad])
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


def test_segments_may_be_int32_and_lie_anywhere(backend, case):
    logits, labels, segments, scales = case
    options = {"z_loss_weight": 0.1, "backend": backend}
    expected = cross_entropy_from_logits(logits, labels, segments=segments, scales=scales, **options)
    for other, factors in ((segments.int(), scales.double()), (scattered(segments), scattered(scales))):
        result = cross_entropy_from_logits(logits, labels, segments=other, scales=factors, **options)
        assert all(torch.equal(*pair) for pair in zip(result, expected, strict=True))


def test_a_row_that_is_not_finite_spoils_its_own_segment_alone(backend, case):
    logits, labels, segments, scales = case
    logits = logits.clone()
    row = int(((segments == 0) & (labels != IGNORED)).nonzero()[0])
    logits[row] = torch.nan
    result = cross_entropy_from_logits(logits, labels, segments=segments, scales=scales, backend=backend)
    assert result.loss.isfinite().tolist() == [False, True, True, True]
    assert not result.total.isfinite()


def test_compiled_equals_eager(backend, case):
    _, labels, segments, scales = case
    generator = torch.Generator().manual_seed(2)
    hidden, weight = (torch.randn(rows, 8, generator=generator).requires_grad_() for rows in (ROWS, VOCAB))

    def both(hidden, weight, labels, segments, scales):
        options = {"segments": segments, "scales": scales, "z_loss_weight": 0.1, "backend": backend}
        masked = masked_cross_entropy(hidden, weight, labels, **options)
        direct = cross_entropy_from_logits(F.linear(hidden, weight), labels, **options)
        return masked, direct

    torch.compiler.reset()
    outcomes = []
    for function in (torch.compile(both, fullgraph=True), both):
        results = function(hidden, weight, labels, segments, scales)
        gradients = torch.autograd.grad(results[0].total + results[1].total, [hidden, weight])
        outcomes.append([tensor.detach() for tensor in (*results[0], *results[1], *gradients)])
    for actual, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_operations_with_segments_are_registered_rightly(backend, case):
    logits, labels, segments, scales = case
    hidden, weight = torch.randn(ROWS, 8), torch.randn(VOCAB, 8)
    rows = (labels, segments, scales, IGNORED, 0.1)
    torch.library.opcheck(op.cross_entropy, (logits, *rows, True, backend))
    torch.library.opcheck(op.cross_entropy_, (logits.clone(), *rows, backend))
    masked = (hidden, weight, labels, None, segments, scales, IGNORED, 0.1, torch.float32, [True, True, False], backend)
    torch.library.opcheck(op.masked_cross_entropy, masked)
    sums = (torch.randn(ROWS), torch.randn(ROWS), torch.ones(ROWS, dtype=torch.int32), labels, segments, scales)
    torch.library.opcheck(
        op.sum_rows, (*sums, [hidden.requires_grad_()], [hidden.detach()], IGNORED, 0.1, VOCAB, False, backend)
    )


@pytest.mark.parametrize("segment", [-1, 4])
@pytest.mark.parametrize("ignored", [False, True])
def test_segments_out_of_range_raise(backend, case, segment, ignored):
    logits, labels, segments, scales = case
    labels, segments = labels.clone(), segments.clone()
    segments[5] = segment
    labels[5] = IGNORED if ignored else 3
    with pytest.raises(RuntimeError, match="segments"):
        cross_entropy_from_logits(logits, labels, segments=segments, scales=scales, backend=backend)


def test_arguments_that_do_not_fit_are_named(backend, case):
    logits, labels, segments, scales = case
    for wrong in (
        {"segments": segments},
        {"scales": scales},
        {"segments": segments[1:], "scales": scales},
        {"segments": segments, "scales": scales[0]},
        {"segments": segments, "scales": scales[:0]},
    ):
        with pytest.raises(ValueError, match=r"segments and scales are .*expected \(61,\) and \[S\]"):
            cross_entropy_from_logits(logits, labels, **wrong, backend=backend)
    with pytest.raises(ValueError, match="scale: rows with segments"):
        cross_entropy_from_logits(logits, labels, segments=segments, scales=scales, scale=0.5, backend=backend)
