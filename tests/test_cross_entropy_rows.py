"""The C++ kernel for rows of logits against PyTorch's cross-entropy in fp64."""

import pytest
import torch
import torch.nn.functional as F

from kernels import cross_entropy_from_logits
from kernels.masked_cross_entropy import cpp
from tests.numerics import assert_accurate, on_threads, same, scattered

IGNORED = -100
SCALE = torch.tensor(0.375)
ONE = torch.ones(())


def rows(logits, labels, gradient, scale, *settings, **options):
    """The kernel, with one scale for all rows."""
    segments = torch.zeros(1, dtype=torch.long).expand(len(labels))
    return cpp.rows(logits, labels, segments, scale.reshape(1), gradient, *settings, **options)


def make_case(count, classes, *, size=2.0):
    """Logits and labels: a third are ignored, and one is the last class."""
    generator = torch.Generator().manual_seed(count + classes)
    logits = (size * torch.randn(count, classes, generator=generator)).bfloat16()
    labels = torch.randint(classes, (count,), generator=generator)
    labels[1::3] = IGNORED
    labels[-1] = classes - 1
    return logits, labels


def expected(logits, labels, scale, z_loss_weight, dtype):
    """Loss and z-loss per row, and the gradient of their sum."""
    logits = logits.detach().to(dtype).requires_grad_()
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
    z_loss = logits.logsumexp(dim=-1).square().where(labels != IGNORED, 0.0)
    (gradient,) = torch.autograd.grad((scale.to(dtype) * (loss + z_loss_weight * z_loss)).sum(), logits)
    return loss.detach(), z_loss.detach(), gradient


def check(logits, labels, scale=SCALE, z_loss_weight=0.0):
    gradient = torch.empty_like(logits)
    loss, z_loss, correct = rows(logits, labels, gradient, scale, IGNORED, z_loss_weight)
    exact, plain = (expected(logits, labels, scale, z_loss_weight, dtype) for dtype in (torch.float64, torch.float32))
    assert_accurate(loss, exact[0], plain[0], name="loss")
    assert_accurate(z_loss, exact[1], plain[1], name="z_loss")
    off_target = torch.arange(logits.shape[1]) != labels[:, None]
    assert_accurate(gradient, exact[2], plain[2].bfloat16(), off_target, name="gradient")
    assert torch.equal(correct, (logits.argmax(dim=-1) == labels).int())
    ignored = labels == IGNORED
    assert all((tensor[ignored] == 0).all() for tensor in (loss, z_loss, correct, gradient))


@pytest.mark.parametrize("count", [1, 3, 127])
@pytest.mark.parametrize("classes", [1, 2, 16, 131, 255, 256, 257, 8192])
@pytest.mark.parametrize("z_loss_weight", [0.0, 0.1])
def test_results_are_as_accurate_as_pytorch(count, classes, z_loss_weight):
    check(*make_case(count, classes), z_loss_weight=z_loss_weight)


@pytest.mark.parametrize("size", [0.0, 1e-3, 100.0, 1e30])
@pytest.mark.parametrize("scale", [0.0, -2.0, 1e-6])
def test_logits_and_scales_of_any_size(size, scale):
    logits, labels = make_case(31, 131, size=size)
    check(logits, labels, torch.tensor(scale))


def test_constants_added_to_logits_do_not_matter_to_the_loss():
    logits = torch.tensor([0.0, 1.0, -2.0, 3.0]).repeat(2, 1)
    near, far = (rows((logits + shift).bfloat16(), torch.tensor([0, 3]), None, ONE, IGNORED, 0.0) for shift in (0, 64))
    assert torch.equal(near[0], far[0])


@pytest.mark.parametrize("classes", [2, 131, 8192])
@pytest.mark.parametrize("above", [4.0, 12.0, 20.0, 40.0])
@pytest.mark.parametrize("level", [-100, 0, 100])
def test_a_confident_prediction_keeps_its_small_loss_and_gradient(classes, above, level):
    logits = torch.full((classes, classes) if classes < 8192 else (3, classes), level, dtype=torch.bfloat16)
    labels = torch.arange(len(logits)) * (classes // len(logits))
    logits[torch.arange(len(logits)), labels] += above
    gradient = torch.empty_like(logits)
    loss, _, correct = rows(logits, labels, gradient, ONE, IGNORED, 0.0)
    others = (classes - 1) * torch.tensor(-above, dtype=torch.float64).exp()
    torch.testing.assert_close(loss.double(), others.log1p().expand_as(loss), rtol=1e-5, atol=0)
    of_label = gradient.gather(1, labels[:, None])[:, 0].double()
    torch.testing.assert_close(of_label, (-others / (1 + others)).expand_as(of_label), rtol=2**-8, atol=0)
    assert correct.all()


@pytest.mark.parametrize("others", [[], [3], [3, 130], [17, 18, 19]])
def test_of_ties_the_first_is_what_the_model_says(others):
    logits = torch.randn(131).clamp(max=1.0).bfloat16().repeat(131, 1)
    largest = [16, *others]
    logits[:, largest] = 2.0
    correct = rows(logits, torch.arange(131), None, ONE, IGNORED, 0.0)[2]
    assert correct.nonzero().flatten().tolist() == [min(largest)]


def test_zeros_of_both_signs_are_a_tie():
    logits = torch.tensor([[-1.0, -0.0, 0.0], [-1.0, 0.0, -0.0]], dtype=torch.bfloat16)
    assert rows(logits, torch.tensor([2, 2]), None, ONE, IGNORED, 0.0)[2].tolist() == [0, 0]
    assert rows(logits, torch.tensor([1, 1]), None, ONE, IGNORED, 0.0)[2].tolist() == [1, 1]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("ignored", [IGNORED, 0, 5])
def test_labels_of_any_integer_type_and_number_to_ignore(dtype, ignored):
    logits, labels = make_case(17, 100)
    labels = torch.where(labels == IGNORED, ignored if dtype.is_signed else 7, labels)
    gradients = [torch.empty_like(logits) for _ in range(2)]
    first = rows(logits, labels, gradients[0], SCALE, ignored, 0.1)
    second = rows(logits, scattered(labels.to(dtype)), gradients[1], SCALE, ignored, 0.1)
    assert same(second, first)
    assert torch.equal(*gradients)
    assert torch.equal((gradients[0] == 0).all(dim=1), labels == ignored)


def test_classes_at_minus_infinity_are_left_out():
    logits, labels = make_case(31, 131)
    logits[:, 40:131] = -torch.inf
    labels = torch.where(labels == IGNORED, IGNORED, labels % 40)
    check(logits, labels, z_loss_weight=0.1)
    loss = rows(logits, torch.full((31,), 50), None, ONE, IGNORED, 0.0)[0]
    assert (loss == torch.inf).all()


@pytest.mark.parametrize("content", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 77, 130])
@pytest.mark.parametrize("label", [0, 77, 130])
def test_what_is_not_a_number_stays_none_in_its_row_alone(content, place, label):
    logits, labels = make_case(6, 131)
    labels[2] = label
    gradients = [torch.empty_like(logits) for _ in range(2)]
    before = rows(logits, labels, gradients[0], SCALE, IGNORED, 0.1)
    logits[2, place] = content
    logits[1, place] = torch.nan  # an ignored row
    after = rows(logits, labels, gradients[1], SCALE, IGNORED, 0.1)
    assert after[0][2].isnan()
    assert after[1][2].isnan()
    assert gradients[1][2].isnan().all()
    others = torch.arange(6) != 2
    pairs = [*zip(after, before, strict=True), gradients]
    assert all(torch.equal(left[others], right[others]) for left, right in pairs)


@pytest.mark.parametrize("classes", [131, 8192])
def test_two_calls_and_two_threads_give_the_same_bits(classes):
    logits, labels = make_case(29, classes)

    def call():
        gradient = torch.empty_like(logits)
        return *rows(logits, labels, gradient, SCALE, IGNORED, 0.1), gradient

    first = on_threads(1, call)
    assert same(on_threads(1, call), first)
    assert same(on_threads(2, call), first)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(("count", "classes"), [(1, 131), (9, 131), (9, 256)])
def test_rows_with_padding_and_gradients_in_place_of_logits(in_place, count, classes):
    logits, labels = make_case(count, classes)
    gradient = torch.empty_like(logits)
    expected = rows(logits, labels, gradient, SCALE, IGNORED, 0.1)
    assert same(rows(logits, labels, None, SCALE, IGNORED, 0.1), expected)
    wider = torch.full((count, classes + 29), torch.nan, dtype=logits.dtype)
    wider[:, :classes] = logits
    out = wider if in_place else torch.full((count, classes + 3), torch.nan, dtype=logits.dtype)
    assert same(rows(wider[:, :classes], labels, out[:, :classes], SCALE, IGNORED, 0.1), expected)
    assert torch.equal(out[:, :classes], gradient)
    assert out[:, classes:].isnan().all()
    assert in_place or torch.equal(wider[:, :classes], logits)


@pytest.mark.parametrize("reuse_logits", [False, True])
def test_the_operation_takes_the_kernel_for_bf16(reuse_logits):
    logits, labels = make_case(9, 131)
    gradient = torch.empty_like(logits)
    loss, z_loss, correct = rows(logits, labels, gradient, SCALE, IGNORED, 0.1)
    assert cpp.supports(logits)
    assert not cpp.supports(logits.float())
    strided = logits.T.contiguous().T.requires_grad_()
    result = cross_entropy_from_logits(
        strided, labels, z_loss_weight=0.1, scale=SCALE, reuse_logits=reuse_logits, backend="cpp"
    )
    result.total.backward()
    assert torch.equal(strided.grad, gradient)
    assert same([result.loss, result.z_loss, result.correct], [loss.sum(), z_loss.sum(), correct.sum()])
