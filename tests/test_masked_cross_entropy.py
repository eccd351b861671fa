"""Masked cross-entropy against an independent fp64 computation."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import cross_entropy_from_logits, masked_cross_entropy
from kernels.masked_cross_entropy import op
from kernels.masked_cross_entropy.check import random_logits
from tests.numerics import assert_accurate, scattered

IGNORED = -100
Z_WEIGHT = 0.1  # large, so that a missing z-loss shows even in bf16
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
        case.bias[-1] = 4.0  # the last class is likely, so that omitting it shows
    return case.to(dtype)


def expected_sums(logits, labels, z_weight):
    """The definition, in the dtype of `logits`: total, loss, z_loss."""
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    z_loss = logits.logsumexp(-1)[labels != IGNORED].square().sum()
    return loss + z_weight * z_loss, loss, z_loss


def run_expected(case, dtype, z_weight, scale, *, bias_in_fp32=False):
    """`bias_in_fp32` is the C++ kernel's rounding: the product is rounded to bf16, the bias is added in fp32."""
    case = case.to(dtype)
    wide = dtype if dtype == torch.float64 else torch.float32
    if bias_in_fp32 and case.bias is not None:
        logits = F.linear(case.hidden, case.weight).to(wide) + case.bias.to(wide)
    else:
        logits = F.linear(case.hidden, case.weight, case.bias).to(wide)
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
    (result.total * 3).backward()  # grad_output must be applied
    reference, reference_gradients = run_expected(case, torch.float64, Z_WEIGHT, 3)
    plain, plain_gradients = run_expected(case, dtype, Z_WEIGHT, 3, bias_in_fp32=backend == "cpp")
    for name, actual, exact, rough in zip(("total", "loss", "z_loss"), result[:3], reference, plain, strict=True):
        assert_accurate(actual.detach(), exact.detach(), rough.detach(), name=name)
    no_label = torch.ones(vocab, dtype=torch.bool)
    no_label[case.labels[case.labels != IGNORED]] = False
    off_target = {"hidden": None, "weight": no_label[:, None], "bias": no_label}
    for name, gradient in case.gradients().items():
        assert_accurate(gradient, reference_gradients[name], plain_gradients[name], off_target[name], name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("rows", "vocab"), [(1, 1), (127, 131), (3, 8192), (5, 12001), (3, 32769), (2, 65536), (2, 65537)]
)
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
def test_logits_of_odd_shapes(backend, device, dtype, rows, vocab, ignored):
    logits, labels = random_logits(max(rows, 4), vocab, dtype, device)
    logits, labels = logits[-rows:], labels[-rows:]
    labels = {"none": labels.clamp(min=0), "some": labels, "all": torch.full_like(labels, IGNORED)}[ignored]
    if ignored == "some":
        labels[0] = IGNORED
    runs = {}
    for kind, run_dtype in (("actual", dtype), ("reference", torch.float64), ("plain", dtype)):
        inputs = logits.detach().to(run_dtype, copy=True).requires_grad_()
        if kind == "actual":
            sums = cross_entropy_from_logits(inputs, labels, z_loss_weight=Z_WEIGHT, backend=backend)[:3]
        else:
            sums = expected_sums(inputs if run_dtype == torch.float64 else inputs.float(), labels, Z_WEIGHT)
        sums[0].backward()
        runs[kind] = (*(tensor.detach() for tensor in sums), inputs.grad)
    off_target = torch.arange(vocab, device=device) != labels[:, None]
    for name, *tensors in zip(("total", "loss", "z_loss", "gradient"), *runs.values(), strict=True):
        assert_accurate(*tensors, off_target if name == "gradient" else None, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("vocab", [3, 131, 2000])
@pytest.mark.parametrize("first", [0, 1, 8])
@pytest.mark.parametrize("width", [2016, 2017])
@pytest.mark.parametrize("reuse", [False, True])
def test_logits_may_lie_anywhere_in_memory(backend, dtype, vocab, first, width, reuse):
    """A view of a wider matrix gives the result of a contiguous one, and memory around it is not modified."""
    logits, labels = random_logits(9, vocab, dtype, torch.device("cpu"))
    options = {"z_loss_weight": Z_WEIGHT, "backend": backend}
    alone = logits.clone().requires_grad_()
    expected = cross_entropy_from_logits(alone, labels, **options)
    (expected.total * 3).backward()
    wider = torch.full((9, width), torch.nan, dtype=dtype)
    part = wider[:, first : first + vocab]
    part.copy_(logits)
    leaf = part.detach().requires_grad_()  # shares the memory
    actual = cross_entropy_from_logits(leaf, labels, reuse_logits=reuse, **options)
    (actual.total * 3).backward()
    torch.testing.assert_close(tuple(actual), tuple(expected), rtol=1e-6, atol=0)
    torch.testing.assert_close(leaf.grad, alone.grad, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-9)
    assert torch.equal(part, leaf.grad if reuse else logits)
    part.detach().fill_(torch.nan)
    assert wider.isnan().all()


@pytest.mark.parametrize("chunk_rows", [1, 7, 64])
def test_chunks_of_any_size_add_up_to_the_whole(backend, monkeypatch, chunk_rows):
    monkeypatch.setattr(op, "CHUNK_BYTES", dict.fromkeys(op.CHUNK_BYTES, chunk_rows * 131 * 4))
    case = make_case(127, 131, torch.float32)
    result = masked_cross_entropy(
        case.hidden, case.weight, case.labels, case.bias, z_loss_weight=Z_WEIGHT, backend=backend
    )
    result.total.backward()
    reference, reference_gradients = run_expected(case, torch.float64, Z_WEIGHT, 1)
    plain, plain_gradients = run_expected(case, torch.float32, Z_WEIGHT, 1)
    for actual, exact, rough in zip(result[:3], reference, plain, strict=True):
        assert_accurate(actual.detach(), exact.detach(), rough.detach())
    for name, gradient in case.gradients().items():
        assert_accurate(gradient, reference_gradients[name], plain_gradients[name], name=name)


def test_uninitialized_memory_is_overwritten(backend, monkeypatch):
    """torch.empty returns NaN or the largest integer here, so reading it before writing changes the result."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setattr(op, "CHUNK_BYTES", dict.fromkeys(op.CHUNK_BYTES, 50 * 1009 * 2))
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        for dtype in (torch.float32, torch.bfloat16):
            test_sums_and_all_gradients_are_accurate(backend, dtype, 1009, 127, 0.4, True)
            test_logits_of_odd_shapes(backend, torch.device("cpu"), dtype, 5, 12001, "some")
    finally:
        torch.use_deterministic_algorithms(False)


def run_both(case, backend, function=lambda f: f):
    """Sums and gradients of both public functions, each passed through `function` (torch.compile, say)."""
    case = case.to(case.hidden.dtype)
    hidden_loss = function(lambda *a: masked_cross_entropy(*a, z_loss_weight=Z_WEIGHT, backend=backend))
    logits_loss = function(lambda *a: cross_entropy_from_logits(*a, z_loss_weight=Z_WEIGHT, scale=0.5, backend=backend))
    masked = hidden_loss(case.hidden, case.weight, case.labels, case.bias)
    (masked.total * 3).backward()
    logits = F.linear(case.hidden, case.weight, case.bias).detach().requires_grad_()
    direct = logits_loss(logits, case.labels)
    (direct.total * 3).backward()
    return [tensor.detach() for tensor in (*masked, *case.gradients().values(), *direct, logits.grad)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_two_calls_give_the_same_bits(backend, dtype):
    case = make_case(127, 1009, dtype)
    assert all(torch.equal(*pair) for pair in zip(run_both(case, backend), run_both(case, backend), strict=True))


@pytest.mark.parametrize("ignored", [0.4, 1.1])
def test_compiled_equals_eager_in_every_output(backend, ignored):
    case = make_case(33, 131, torch.float32, ignored=ignored)
    torch.compiler.reset()
    compiled = run_both(case, backend, lambda function: torch.compile(function, fullgraph=True))
    for actual, expected in zip(compiled, run_both(case, backend), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


def test_another_number_of_rows_does_not_recompile(backend):
    torch.compiler.reset()
    compiled = torch.compile(
        lambda hidden, weight, labels: masked_cross_entropy(hidden, weight, labels, backend=backend).total,
        fullgraph=True,
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in (5, 9, 64):
            case = make_case(rows, 131, torch.float32, bias=False)
            torch._dynamo.mark_dynamic(case.hidden, 0)
            torch._dynamo.mark_dynamic(case.labels, 0)
            total = compiled(case.hidden, case.weight, case.labels)
            total.backward()
            expected = masked_cross_entropy(case.hidden, case.weight, case.labels, backend=backend).total
            torch.testing.assert_close(total, expected)


def test_operations_are_registered_rightly(backend):
    case = make_case(9, 131, torch.float32)
    hidden, weight, bias = (tensor.detach() for tensor in case.inputs.values())
    logits, scale = F.linear(hidden, weight, bias), torch.tensor([0.5])
    for with_gradient in (True, False):
        rows = (logits, case.labels, None, scale, IGNORED, Z_WEIGHT)
        torch.library.opcheck(op.cross_entropy, (*rows, with_gradient, backend))
        masked = (hidden, weight, case.labels, bias, None, None, IGNORED, Z_WEIGHT, torch.float32)
        torch.library.opcheck(op.masked_cross_entropy, (*masked, [with_gradient] * 3, backend))
    torch.library.opcheck(op.cross_entropy_, (logits.clone(), case.labels, None, scale, IGNORED, Z_WEIGHT, backend))
    torch.library.opcheck(op.multiply_, (logits.clone(), scale, backend))
    inputs = [case.hidden, case.weight]
    gradients = [torch.randn_like(tensor) for tensor in inputs]
    torch.library.opcheck(op.multiplied, (gradients, scale, backend))
    rows = torch.randn(9), torch.randn(9), torch.ones(9, dtype=torch.int32)
    settings = (IGNORED, Z_WEIGHT, 131, False, backend)
    for attached in ((inputs, gradients), ([], [])):
        torch.library.opcheck(op.sum_rows, (*rows, case.labels, None, scale, *attached, *settings))


def test_reusing_the_logits_changes_no_result_and_is_declared(backend):
    logits, labels = random_logits(9, 131, torch.float32, torch.device("cpu"))
    runs = []
    for reuse in (False, True):
        leaf = logits.clone().requires_grad_()
        own = leaf * 1.0
        result = cross_entropy_from_logits(own, labels, z_loss_weight=Z_WEIGHT, reuse_logits=reuse, backend=backend)
        (result.total * 3).backward()
        runs.append([*(tensor.detach() for tensor in result), leaf.grad])
        assert torch.equal(own, logits) is not reuse
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))
    leaf = logits.clone().requires_grad_()
    own = leaf.exp()  # exp's backward needs its own output
    total = cross_entropy_from_logits(own, labels, reuse_logits=True, backend=backend).total
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_scale_is_a_factor_of_the_total_alone(backend):
    logits, labels = random_logits(9, 131, torch.float32, torch.device("cpu"))
    plain, scaled = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    one = cross_entropy_from_logits(plain, labels, z_loss_weight=Z_WEIGHT, backend=backend)
    quarter = cross_entropy_from_logits(
        scaled, labels, z_loss_weight=Z_WEIGHT, scale=torch.tensor(0.25), backend=backend
    )
    one.total.backward()
    quarter.total.backward()
    assert torch.equal(quarter.total, one.total / 4)
    assert all(torch.equal(*pair) for pair in zip(quarter[1:], one[1:], strict=True))
    assert torch.equal(scaled.grad, plain.grad / 4)


def test_a_second_backward_is_right_or_an_error(backend):
    case = make_case(9, 131, torch.float32)
    total = masked_cross_entropy(case.hidden, case.weight, case.labels, backend=backend).total
    first = torch.autograd.grad(total * 2, case.hidden, retain_graph=True)[0].clone()
    assert torch.equal(torch.autograd.grad(total * 2, case.hidden)[0], first)
    logits = torch.randn(9, 131, requires_grad=True)
    total = cross_entropy_from_logits(logits, case.labels, backend=backend).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_without_gradients_none_are_computed(backend):
    case = make_case(9, 131, torch.float32)
    with torch.no_grad():
        result = masked_cross_entropy(case.hidden, case.weight, case.labels, case.bias, backend=backend)
    with_gradients = masked_cross_entropy(case.hidden, case.weight, case.labels, case.bias, backend=backend)
    assert not result.total.requires_grad
    assert torch.equal(result.total, with_gradients.total)
    frozen = masked_cross_entropy(case.hidden, case.weight.detach(), case.labels, backend=backend)
    frozen.total.backward()
    assert case.hidden.grad is not None
    assert case.weight.grad is None


def test_autocast_multiplies_in_bf16_and_returns_wide_gradients(backend):
    case = make_case(64, 131, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        result = masked_cross_entropy(
            case.hidden, case.weight, case.labels, case.bias, z_loss_weight=Z_WEIGHT, backend=backend
        )
    result.total.backward()
    narrow = case.to(torch.bfloat16)
    reference, gradients = run_expected(narrow, torch.float64, Z_WEIGHT, 1)
    plain, plain_gradients = run_expected(narrow, torch.bfloat16, Z_WEIGHT, 1)
    assert_accurate(result.total.detach(), reference[0].detach(), plain[0].detach())
    for name, gradient in case.gradients().items():
        assert gradient.dtype == torch.float32
        assert_accurate(gradient.bfloat16(), gradients[name], plain_gradients[name], name=name)


@pytest.mark.parametrize(
    "shapes", [[(4, 8), (9, 7), (4,)], [(4, 8), (9, 8), (5,)], [(4, 8), (9, 8), (4,), (8,)], [(2, 2, 8), (9, 8), (4,)]]
)
def test_shapes_that_do_not_fit_are_named(backend, shapes):
    hidden, weight, labels, *bias = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=r"expected \[N, D\], \[V, D\], \[N\], \[V\]"):
        masked_cross_entropy(hidden, weight, labels.long(), *bias, backend=backend)
    with pytest.raises(ValueError, match=r"expected \[N, V\] and \[N\]"):
        cross_entropy_from_logits(torch.zeros(3, 5), torch.zeros(4, dtype=torch.long), backend=backend)


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
    """The loss is e^−12 per row, less than one rounding of the logits, so lse − logit would round it away."""
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
    apart = masked_cross_entropy(case.hidden, case.weight, scattered(case.labels), case.bias, backend=backend)
    assert all(torch.equal(one, other) for one, other in zip(long, apart, strict=True))
    assert all(torch.equal(*pair) for pair in zip(before, (*case.inputs.values(), case.labels), strict=True))


def test_unknown_backend_is_an_error(monkeypatch):
    case = make_case(4, 131, torch.float32)
    with pytest.raises(ValueError, match="backend='cuda'"):
        masked_cross_entropy(case.hidden, case.weight, case.labels, backend="cuda")
    monkeypatch.setenv("KERNELS_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="KERNELS_BACKEND='nonsense'"):
        masked_cross_entropy(case.hidden, case.weight, case.labels)
