"""Masked cross-entropy of a packed weight, whose gradient goes to memory that stays."""

import pytest
import torch

from kernels import masked_cross_entropy
from kernels.linear import Packed
from kernels.masked_cross_entropy import op
from tests.test_masked_cross_entropy import IGNORED, Z_WEIGHT, make_case

VOCAB = 131
PLAIN = {"z_loss_weight": Z_WEIGHT, "scales": torch.tensor([0.5, 2.0])}


def run(case, backend, weight):
    segments = torch.arange(len(case.labels)) % 2
    return masked_cross_entropy(
        case.hidden, weight, case.labels, case.bias, segments=segments, backend=backend, **PLAIN
    )


def packed(case, *, overwrites, dtype=torch.float32, before=1.0):
    case.weight.grad = torch.full_like(case.weight, before, dtype=torch.float32)
    weight = Packed.of([case.weight], dtype).with_gradient(overwrites=overwrites)
    assert weight.gradient.data_ptr() == case.weight.grad.data_ptr()
    return weight


@pytest.mark.parametrize("chunk_rows", [64, 1000])
@pytest.mark.parametrize("overwrites", [False, True])
def test_the_gradient_in_memory_is_autograds(backend, monkeypatch, overwrites, chunk_rows):
    """Added to what is there, or written over NaN; sums and other gradients are the same."""
    monkeypatch.setattr(op, "CHUNK_BYTES", dict.fromkeys(op.CHUNK_BYTES, chunk_rows * VOCAB * 4))
    cases = [make_case(150, VOCAB, torch.float32) for _ in range(2)]
    before = torch.nan if overwrites else 1.0
    weights = [cases[0].weight, packed(cases[1], overwrites=overwrites, before=before)]
    sums = [run(case, backend, weight) for case, weight in zip(cases, weights, strict=True)]
    for result in sums:
        result.total.backward()
    torch.testing.assert_close(tuple(sums[1]), tuple(sums[0]), rtol=0, atol=0)
    if not overwrites:
        cases[1].weight.grad -= 1
    for name, expected in cases[0].gradients().items():
        torch.testing.assert_close(cases[1].gradients()[name], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("overwrites", [False, True])
def test_products_are_of_the_copy_in_its_dtype(backend, overwrites):
    case = make_case(50, VOCAB, torch.float32)
    exact = run(case, backend, case.weight)
    (expected,) = torch.autograd.grad(exact.total, case.weight)
    weight = packed(case, overwrites=overwrites, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        run(case, backend, weight).total.backward()
    error = case.weight.grad - (0 if overwrites else 1) - expected
    assert 0 < error.norm() < 0.02 * expected.norm()
    weight.narrow.zero_()
    with torch.autocast("cpu", torch.bfloat16):
        assert run(case, backend, weight).loss.sum() != pytest.approx(exact.loss.sum().item(), rel=1e-3)


def test_without_memory_autograd_gets_the_gradient(backend):
    case = make_case(50, VOCAB, torch.float32)
    weight = Packed.of([case.weight], torch.float32)
    expected = torch.autograd.grad(run(case, backend, case.weight).total, list(case.inputs.values()))
    actual = torch.autograd.grad(run(case, backend, weight).total, list(case.inputs.values()))
    for pair in zip(actual, expected, strict=True):
        assert torch.equal(*pair)


def test_memory_stays_as_it_is_where_nothing_is_differentiated(backend):
    case = make_case(50, VOCAB, torch.float32)
    weight = packed(case, overwrites=True)
    with torch.no_grad():
        run(case, backend, weight)
    assert (weight.gradient == 1).all()


def test_a_factor_of_the_loss_would_miss_the_memory(backend):
    case = make_case(9, VOCAB, torch.float32)
    total = run(case, backend, packed(case, overwrites=True)).total
    with pytest.raises(RuntimeError, match=r"`grad_output` must be 1; put factors into `scales`"):
        (total * 2).backward()


def test_the_operation_is_registered_rightly(backend):
    case = make_case(9, VOCAB, torch.float32)
    hidden, weight, bias = (tensor.detach() for tensor in case.inputs.values())
    rows = (hidden, weight, case.labels, bias, None, None, IGNORED, Z_WEIGHT, torch.float32)
    for overwrites in (False, True):
        memory = torch.ones_like(weight)
        torch.library.opcheck(op.masked_cross_entropy_, (*rows, [True] * 3, backend, memory, overwrites))


def never_adds(total, left, right, *, overwrites, by_cpp):
    del overwrites, by_cpp
    torch.mm(left, right, out=total)


def always_adds(total, left, right, *, overwrites, by_cpp):
    del overwrites, by_cpp
    total.addmm_(left, right)


@pytest.mark.parametrize(("planted", "overwrites"), [(never_adds, False), (always_adds, True)])
def test_planted_bugs_are_found(monkeypatch, planted, overwrites):
    monkeypatch.setattr(op, "_add_product", planted)
    with pytest.raises(AssertionError):
        test_the_gradient_in_memory_is_autograds("torch", monkeypatch, overwrites, 64)
