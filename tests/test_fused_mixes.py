"""Fused mixes in Triton's interpreter, against plain PyTorch in fp64, alone and in a model.

Their whole check runs in tests/test_check.py.
"""

import copy
import dataclasses
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

from gptbert.distributed.flat_gradients import FlatGradients
from gptbert.distributed.world import World
from gptbert.model import GPTBert
from gptbert.model.batch import Batch
from gptbert.model.compilation import compile_blocks
from gptbert.training.packed_weights import PackedWeights
from kernels import wanted, whole_rows
from kernels.backend import set_default_backend
from kernels.depth_mix import FusedMixes, check, is_fused, kernel
from kernels.dropout import dropout
from tests.conftest import TINY
from tests.gpu.tracing import trace_only
from tests.mutation import mutated
from tests.numerics import assert_accurate, relative_error
from tests.sanitizer import checked_addresses

CPU = torch.device("cpu")
EPS = 1e-5


def make_case(num_mixes, size, rows=3, seed=0):
    """Leaves: y_0, weights, biases of every second mix, matrices of the sub-layers; and dropout's seeds."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(2, rows, size, generator=generator)
    alphas = [torch.randn(depth + 1, generator=generator) / depth for depth in range(1, num_mixes + 1)]
    biases = [torch.randn(size, generator=generator) for _ in range(0, num_mixes, 2)]
    matrices = [torch.randn(size, size, generator=generator) / size**0.5 for _ in range(num_mixes)]
    seeds = torch.randint(-(2**31), 2**31, (num_mixes, 2), generator=generator).int()
    return [first, *alphas, *biases, *matrices], seeds


def parts(leaves, num_mixes):
    first, *rest = leaves
    alphas, rest = rest[:num_mixes], rest[num_mixes:]
    biases, matrices = rest[: -(-num_mixes // 2)], rest[-(-num_mixes // 2) :]
    return first, alphas, [biases[depth // 2] if depth % 2 == 0 else None for depth in range(num_mixes)], matrices


def run(case, *, prob=0.2):
    """x_M and h_M, and all gradients, through sub-layers that are a product each."""
    tensors, seeds = case
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    first, alphas, biases, matrices = parts(leaves, len(seeds))
    mixes = FusedMixes(alphas, torch.float32, prob, EPS)
    x, h = mixes.start(first)
    for matrix, bias, seed in zip(matrices, biases, seeds, strict=True):
        x, h = mixes.mix(h @ matrix, bias, x, seed)
    return x.detach(), h.detach(), *torch.autograd.grad(x.sin().sum() + h.cos().sum(), leaves)


def definition(case, dtype, *, prob=0.2):
    tensors, seeds = case
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
    first, alphas, biases, matrices = parts(leaves, len(seeds))
    size = first.shape[-1:]
    x, seen, h = first, [first], F.layer_norm(first, size, eps=EPS)
    for alpha, matrix, bias, seed in zip(alphas, matrices, biases, seeds, strict=True):
        out = h @ matrix
        seen.append(x + dropout(out if bias is None else out + bias, seed, prob))
        x = sum(weight * y for weight, y in zip(alpha, seen, strict=True))
        h = F.layer_norm(x, size, eps=EPS)
    return x.detach(), h.detach(), *torch.autograd.grad(x.sin().sum() + h.cos().sum(), leaves)


@pytest.mark.parametrize(
    ("num_mixes", "size", "prob", "rows"),
    [
        *((1, 5, 0.2, 16), (2, 16, 0.2, 1), (5, 20, 0.0, 4), (6, 9, 0.2, 1)),
        *((7, 24, 0.0, 1), (7, 24, 0.2, 16), (13, 12, 0.2, 1), (13, 12, 0.2, 4)),
    ],
)
def test_results_and_gradients_are_those_of_the_definition(monkeypatch, num_mixes, size, prob, rows):
    """One group of mixes, a group and one more, two and one more; a program of one row, as on GPUs, and of several."""
    monkeypatch.setattr(whole_rows, "ROWS_INTERPRETED", rows)
    case = make_case(num_mixes, size)
    results = [run(case, prob=prob), *(definition(case, dtype, prob=prob) for dtype in (torch.float64, torch.float32))]
    kinds = {"x": [0], "h": [1], "first": [2], "weights": range(3, 3 + num_mixes), "rest": range(3 + num_mixes, 99)}
    for name, places in kinds.items():
        joined = [torch.cat([result[place].flatten() for place in places if place < len(result)]) for result in results]
        assert_accurate(*joined, name=name)


def test_a_process_wants_them_or_does_without():
    set_default_backend("triton")
    sizes = (CPU, torch.float32, 64, 4)
    assert not is_fused(*sizes)
    wanted.use_fused(["depth_mix"])
    assert is_fused(*sizes)
    assert not is_fused(*sizes, backend="torch")
    assert not is_fused(CPU, torch.bfloat16, 64, 4), "in the interpreter"
    assert is_fused(torch.device("cuda", 0), torch.bfloat16, 64, 4)
    assert not is_fused(CPU, torch.float32, 8193, 4)
    assert not is_fused(CPU, torch.float32, 64, 128)
    wanted.use_fused([])
    assert not is_fused(*sizes)
    with pytest.raises(ValueError, match="no fused operation lamb; there are attention_context, gated_norm, norm"):
        wanted.use_fused(["lamb", "depth_mix"])


def test_two_calls_give_the_same_bits():
    case = make_case(7, 12)
    assert all(torch.equal(*pair) for pair in zip(run(case), run(case), strict=True))


def test_more_mixes_than_weights_and_a_second_backward_are_refused():
    (first, alpha, bias, matrix), (seed,) = make_case(1, 8)
    mixes = FusedMixes([alpha.requires_grad_()], torch.float32, 0.0, EPS)
    x, h = mixes.start(first)
    x, h = mixes.mix(h @ matrix, bias, x, seed)
    with pytest.raises(ValueError, match="mix 2 of 1"):
        mixes.mix(h @ matrix, bias, x, seed)
    total = x.sum() + h.sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a forward has one backward"):
        total.backward()


def test_the_first_representation_may_be_used_without_its_norm():
    weights, first = torch.tensor([2.0, 3.0]), torch.randn(2, 3, 8).requires_grad_()
    mixes = FusedMixes([weights], torch.float32, 0.0, EPS)
    x, _ = mixes.start(first)
    x, _ = mixes.mix(torch.ones(2, 3, 8), None, x, None)
    (grad,) = torch.autograd.grad(x.sum(), first)
    torch.testing.assert_close(grad, torch.full_like(first, 2.0 + 3.0))


def test_more_elements_than_int32_counts_are_refused():
    x = torch.empty(2**21, 1024, device="meta")
    with pytest.raises(ValueError, match="2097152 rows of 1024 are 2³¹ elements or more"):
        kernel.forward(None, None, x, *[None] * 7, 0, 1, 0.0, EPS)


@pytest.mark.parametrize(("num_mixes", "size"), [(1, 5), (8, 12)])
def test_every_address_lies_in_a_tensor(num_mixes, size):
    with checked_addresses() as faults:
        run(make_case(num_mixes, size))
    assert faults == []
    assert faults.seen > 1000


def test_an_address_elsewhere_is_seen(tmp_path):
    old, new = "x = tl.load(x_ptr + offsets, mask=is_inside,", "x = tl.load(x_ptr + offsets + 1, mask=is_inside,"
    with planted("kernel", old, new, tmp_path), checked_addresses() as faults:
        run(make_case(1, 5))
    assert "load of 4 bytes" in faults


@pytest.fixture
def triton():
    """The fused kernels for models that the test makes."""
    set_default_backend("triton")


OBJECTIVES = {"MLM": (1, 1), "CLM": (0, 1), "hybrid": (1, 2)}  # masked rows, rows


@pytest.mark.parametrize(
    ("masked", "rows", "operations", "layers", "length"),
    [
        (1, 2, ["depth_mix"], 4, 7),
        (1, 2, wanted.FUSED, 1, 17),
        (0, 2, wanted.FUSED, 1, 16),
        (2, 2, wanted.FUSED, 1, 33),
        *((*OBJECTIVES[name], wanted.FUSED, 1, length) for name in OBJECTIVES for length in (128, 256)),
    ],
)
def test_a_model_is_the_same_fused_and_not(triton, masked, rows, operations, layers, length):
    """Loss, and all gradients as one vector, to 1e-6; with dropout, documents and padding.

    Each gradient by itself is compared with fp64's: those of layer weights, sums that cancel, have errors of up to 1e-5
    where they are not fused.
    """
    shape = {"hidden_size": 64, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    shape |= {"num_attention_heads": 1} if length > 64 else {}
    torch.manual_seed(0)
    model = GPTBert(dataclasses.replace(TINY, num_hidden_layers=layers, **shape))
    for param in model.parameters():
        param.data += 0.05 * torch.randn_like(param)
    ids = torch.randint(16, TINY.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))
    documents = (torch.arange(length) // (70 if length > 64 else 7)).repeat(rows, 1)
    documents[-1, -4:] = -1
    batch = Batch(ids, documents, ids, num_masked=masked)

    def loss_and_gradients(model, *, is_checkpointed=False):
        for block in model.blocks:
            block.is_checkpointed = is_checkpointed
        model.zero_grad()
        torch.manual_seed(5)  # of dropout
        result = model(batch, torch.tensor([2.0, 0.5]), 1e-2)
        result.total.backward()
        return [result.total.detach(), *(param.grad.clone() for param in model.parameters())]

    exact, unfused = loss_and_gradients(copy.deepcopy(model).double()), loss_and_gradients(model)
    wanted.use_fused(operations)
    fused = loss_and_gradients(model)
    assert relative_error(fused[0], unfused[0]) < 1e-6
    whole, expected = (torch.cat([grad.flatten() for grad in grads[1:]]) for grads in (fused, unfused))
    assert (whole - expected).norm() < 1e-6 * expected.norm()
    for (name, _), *gradients in zip(model.named_parameters(), fused[1:], exact[1:], unfused[1:], strict=True):
        assert_accurate(*gradients, name=name)
    if length > 64:  # the interpreter is slow
        return
    assert all(map(torch.equal, fused, loss_and_gradients(model, is_checkpointed=True)))
    model.eval()
    with torch.no_grad():
        states = model.encode(ids, documents, causal=True)
        wanted.use_fused([])
        torch.testing.assert_close(states, model.encode(ids, documents, causal=True), rtol=1e-5, atol=1e-5)


def test_compiled_sub_layers_are_eager_ones_for_any_number_of_rows(triton, fresh_compiler, monkeypatch):
    trace_only(monkeypatch)  # Inductor takes minutes
    wanted.use_fused(wanted.FUSED)
    shape = {"hidden_size": 64, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    torch.manual_seed(0)
    model = GPTBert(dataclasses.replace(TINY, num_hidden_layers=1, **shape))
    ends = []
    for is_compiled in (False, True):
        if is_compiled:
            compile_blocks(model.blocks, mixed_precision=False)
        for rows in (2, 3, 1):
            ids = torch.randint(16, TINY.vocab_size, (rows, 16), generator=torch.Generator().manual_seed(rows))
            documents = torch.zeros(rows, 20, dtype=torch.long)[:, :16]  # part of wider rows, as a validation's
            model.zero_grad()
            torch.manual_seed(5)
            with torch._dynamo.config.patch(error_on_recompile=rows != 2):
                result = model(Batch(ids, documents, ids, num_masked=1))
            result.total.backward()
            ends.append([result.total.detach(), *(param.grad.clone() for param in model.parameters())])
    for eager, compiled in zip([*ends[0], *ends[1], *ends[2]], [*ends[3], *ends[4], *ends[5]], strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


def test_compiled_blocks_with_packed_weights_share_two_graphs(triton, fresh_compiler, monkeypatch):
    """As in training: weights are packed once, and their gradients are added to memory that stays."""
    graphs = []
    trace_only(monkeypatch, graphs)
    wanted.use_fused(wanted.FUSED)
    shape = {"hidden_size": 64, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    ends = []
    for is_compiled in (False, True):
        torch.manual_seed(0)
        model = GPTBert(dataclasses.replace(TINY, num_hidden_layers=2, **shape))
        weights = PackedWeights(model, torch.float32)
        FlatGradients(model.parameters(), World(0, 1, CPU))
        weights.add_gradients_directly()
        if is_compiled:
            compile_blocks(model.blocks, mixed_precision=False)
        for rows in (2, 3):
            ids = torch.randint(16, TINY.vocab_size, (rows, 16), generator=torch.Generator().manual_seed(rows))
            torch.manual_seed(5)
            batch = Batch(ids, torch.zeros_like(ids), ids, num_masked=1)
            total = model(batch, None, 0.0, None, weights.weights).total
            total.backward()
            ends.append([total.detach(), *(param.grad.clone() for param in model.parameters())])
    for eager, compiled in zip([*ends[0], *ends[1]], [*ends[2], *ends[3]], strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)
    assert len(graphs) == 2


def planted(module, old, new, folder):
    """A bug in the kernels, or in the hash of dropout's masks."""
    name = "kernels.dropout_hash" if module == "dropout_hash" else f"kernels.depth_mix.{module}"
    return mutated(name, old, new, folder, users=[kernel])


# No bug writes out of bounds: that would crash the tests, not fail them.
MUTANTS = {
    "weights of another mix": ("gram_kernel", "(depth - 1) * (depth + 2) // 2", "(depth - 1) * depth // 2"),
    "weights not transposed": ("kernel", "row_of(m) + depth if BACKWARD else", "row_of(depth) + m if BACKWARD else"),
    "a representation too few": (
        "kernel", "for index in tl.static_range(1, _G)",
        "for index in tl.static_range(2, _G)",
    ),
    "without the sub-layer": ("kernel", "newest = x + output", "newest = x"),
    "without the residual": ("kernel", "newest = x + output", "newest = output"),
    "without the bias": ("kernel", "output += bias.to(tl.float32)", "output += 0 * bias.to(tl.float32)"),
    "nothing dropped": ("kernel", "output = tl.where(kept, output * keep_scale, 0.0)", "output = output * keep_scale"),
    "what is kept not scaled": (
        "kernel", "output = tl.where(kept, output * keep_scale, 0.0)",
        "output = tl.where(kept, output, 0.0)",
    ),
    "another mask": (
        "dropout_hash", "words = (words ^ (words >> 13)) * 0xC2B2AE35",
        "words = (words ^ (words >> 12)) * 0xC2B2AE35",
    ),
    "mean over the tile": ("kernel", "mean = tl.sum(mixed, axis=1) / size", "mean = tl.sum(mixed, axis=1) / BLOCK"),
    "variance over the tile": ("kernel", "centered, axis=1) / size", "centered, axis=1) / BLOCK"),
    "padding in the variance": ("kernel", "tl.where(is_inside, mixed - mean[:, None], 0.0)", "mixed - mean[:, None]"),
    "no eps": ("kernel", "/ size + eps)", "/ size)"),
    "x without its gradient": ("kernel", "mask=is_inside & (has_x != 0)", "mask=is_inside & (has_x > 1)"),
    "LayerNorm without its mean": ("kernel", "(of_h - mean[:, None] - h", "(of_h - h"),
    "LayerNorm without its direction": ("kernel", "mean[:, None] - h * along_h[:, None])", "mean[:, None])"),
    "LayerNorm without its scale": ("kernel", "of_x = inverse_std[:, None] * (of_h", "of_x = (of_h"),
    "own weight left out": ("kernel", "+ own_weight * grad", "+ grad"),
    "deeper gradients left out": (
        "kernel", "newest += _weighted(deeper, alpha_ptr, depth, depth + 1, last + 1, True) + own",
        "newest += own",
    ),
    "gradients not dropped": (
        "kernel", "newest = tl.where(kept, newest * keep_scale, 0.0)",
        "newest = newest * keep_scale",
    ),
    "bias of the last row": ("kernel", "bias_sums += newest", "bias_sums = newest"),
    "a group without the earlier ones": ("kernel", "has_partial = begin > 1", "has_partial = begin > 99"),
    "a group without the deeper ones": (
        "kernel", "has_partial, programs = last < num_mixes,",
        "has_partial, programs = False,",
    ),
    "sums of one chunk": ("kernel", "sums[output] + _weighted(", "_weighted("),
    "sums of one depth": (
        "kernel", "_weighted(values, alpha_ptr, depth + output,",
        "_weighted(values, alpha_ptr, depth,",
    ),
    "forward weights in the backward's sums": (
        "kernel", "depth + output, start, end, BACKWARD),)",
        "depth + output, start, end, False),)",
    ),
    "the newest without its gradient": ("gram_kernel", "mask=(old <= last)[:, None]", "mask=(old < last)[:, None]"),
    "one program's part": ("gram_kernel", "mask=part < num_parts", "mask=part < 1"),
}  # fmt: skip
CASES = [(2, 12, 0.2), (7, 12, 0.2), (13, 12, 0.2)]  # the smallest first, which shows most of them


@contextmanager
def planted_in_a_small_case(name, folder):
    """One of `MUTANTS`, where a small case has several parts, and a program several rows."""
    with planted(*MUTANTS[name], folder), pytest.MonkeyPatch.context() as patch:
        own = kernel.backward.__globals__  # the changed module's
        patch.setitem(kernel.weight_gradients.__globals__, "GRAM_BLOCK", 32)
        patch.setitem(own, "PROGRAMS", 2)
        patch.setattr(whole_rows, "ROWS_INTERPRETED", 1)
        yield


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bugs_are_found(name, tmp_path):
    found = False
    with planted_in_a_small_case(name, tmp_path):
        for num_mixes, size, prob in CASES:
            case = make_case(num_mixes, size)
            if name == "no eps":
                case[0][0].zero_()
            actual = run(case, prob=prob)
            exact, plain = (definition(case, dtype, prob=prob) for dtype in (torch.float64, torch.float32))
            try:
                for index, tensors in enumerate(zip(actual, exact, plain, strict=True)):
                    assert_accurate(*tensors, name=str(index))
            except AssertionError:
                found = True
                break
    assert found


def test_the_check_finds_them_too(tmp_path):
    right = [comparison.passed for comparison in check.compare_fused(CPU, 3, 12, 7, torch.float32)]
    assert all(right)
    for name in ("own weight left out", "nothing dropped", "gradients not dropped", "another mask"):
        with planted(*MUTANTS[name], tmp_path):
            found = [comparison.passed for comparison in check.compare_fused(CPU, 3, 12, 7, torch.float32)]
        assert not all(found), name
