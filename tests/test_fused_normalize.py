"""The embedding's and the head's Triton kernels in the interpreter, against PyTorch in fp64; dropout by several masks.

Their whole check runs in tests/test_check.py.
"""

import pytest
import torch

from kernels import wanted, whole_rows
from kernels.backend import set_default_backend
from kernels.dropout import check as dropout_check
from kernels.dropout import dropout, dropouts
from kernels.dropout import fused as fused_dropout
from kernels.dropout import is_fused as are_dropouts_fused
from kernels.dropout import kernel as dropout_kernel
from kernels.normalize import activate, check, embed, fused, is_fused, kernel, reference
from tests.mutation import mutated
from tests.numerics import assert_accurate
from tests.sanitizer import checked_addresses

CPU = torch.device("cpu")
EPS = 1e-5
SEED = torch.tensor([77, -5], dtype=torch.int32)
SEEDS = torch.tensor([[77, -5], [3, 4], [0, 0], [-(2**31), 9]], dtype=torch.int32)


def make_embedding(rows, size, *, seed=0):
    """Ids [2, rows] of a table of seven rows, some several times; the table; the result's gradient."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(7, (2, rows), generator=generator)
    return ids, torch.randn(7, size, generator=generator), torch.randn(2, rows, size, generator=generator)


def run_embedding(case, prob, function, dtype=torch.float32):
    ids, table, grad = case
    table = table.to(dtype).requires_grad_()
    result = function(ids, table, SEED, prob, EPS)
    return result.detach(), *torch.autograd.grad(result, table, grad.to(dtype))


def run_head(case, prob, function, dtype=torch.float32):
    _, _, grad = case
    x = (3 * grad.flip(0)).to(dtype).requires_grad_()
    result = function(x, SEED, prob, EPS)
    return result.detach(), *torch.autograd.grad(result, x, grad.to(dtype))


def assert_right(case, prob):
    for run, function, definition in (
        (run_embedding, embed, reference.embed),
        (run_head, activate, reference.activate),
    ):
        results = (
            run(case, prob, function),
            *(run(case, prob, definition, dtype) for dtype in (torch.float64, torch.float32)),
        )
        for name, *tensors in zip(("result", "gradient"), *results, strict=True):
            assert_accurate(*tensors, name=f"{run.__name__} {name}")


@pytest.mark.parametrize("size", [1, 5, 16, 300])
@pytest.mark.parametrize(("prob", "rows"), [(0.0, 4), (0.2, 1), (0.2, 16)])
def test_results_and_gradients_are_those_of_the_definition(monkeypatch, size, prob, rows):
    """A program of one row, as on GPUs, and of several."""
    monkeypatch.setattr(whole_rows, "ROWS_INTERPRETED", rows)
    assert_right(make_embedding(9, size), prob)


def test_the_masks_are_those_of_dropout():
    ids, table, _ = make_embedding(5, 12)
    kept = dropout(torch.ones(2, 5, 12), SEED, 0.3) != 0
    assert torch.equal(embed(ids, table, SEED, 0.3, EPS) != 0, kept)
    assert torch.equal(activate(torch.randn(2, 5, 12), SEED, 0.3, EPS) != 0, kept)


def test_no_rows():
    x = torch.empty(0, 16).requires_grad_()
    activate(x, SEED, 0.1, EPS).sum().backward()
    assert x.grad.shape == (0, 16)


def added(ids, grad, dtype):
    """A table of ones to which gradients were added, row by row."""
    table = torch.ones(7, grad.shape[-1], dtype=dtype)
    for row, own in zip(grad.flatten(0, 1).to(dtype), ids.flatten().tolist(), strict=True):
        table[own] += row
    return table


def assert_adds_right(rows=9, size=12, ids=None):
    case = make_embedding(rows, size)
    ids = case[0] if ids is None else ids.expand(2, rows)
    memories = [torch.ones(7, size) for _ in range(2)]
    for memory in memories:
        fused.add_rows(memory, ids.flatten(), case[2].flatten(0, 1))
    assert torch.equal(*memories), "the same bits"
    assert_accurate(
        memories[0], *(added(ids, case[2], dtype) for dtype in (torch.float64, torch.float32)), name="table"
    )


@pytest.fixture
def small_groups(monkeypatch):
    monkeypatch.setattr(kernel, "ADDED_ROWS", 4)


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("rows", [1, 2, 4, 7, 18, 40])
def test_gradients_of_rows_are_added_to_those_of_a_table(rows):
    """Ids whose places are in one group, in two, and in more than a program takes at a time; and one id everywhere."""
    assert_adds_right(rows, 3)
    assert_adds_right(rows, 3, torch.tensor(6))
    assert_adds_right(rows, 3, torch.arange(rows) // 4 % 7)


def test_gradients_wider_than_a_program_are_added():
    assert_adds_right(17, 300)


@pytest.mark.parametrize("prob", [0.0, 0.2])
def test_the_embeddings_backward_adds_to_memory(prob):
    case = make_embedding(9, 12)
    _, expected = run_embedding(case, prob, embed)
    memory, weight = torch.ones(7, 12), case[1].detach().clone().requires_grad_()
    embed(case[0], weight, SEED, prob, EPS, memory).backward(case[2])
    assert weight.grad is None
    torch.testing.assert_close(memory - 1, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [5, 300])
def test_every_address_lies_in_a_tensor(size):
    case = make_embedding(9, size)
    with checked_addresses() as faults:
        run_embedding(case, 0.2, embed)
        kernel.add_rows(torch.zeros(7, size), case[0].flatten(), case[2].flatten(0, 1))
        run_head(case, 0.2, activate)
        torch.autograd.grad(dropouts(case[1].requires_grad_(), SEEDS, 0.2, torch.float32).sum(), case[1])
    assert faults == []
    assert faults.seen > 500


def test_an_address_elsewhere_is_seen(tmp_path):
    old, new = "is_row[:, None] & (columns < size)", "is_row[:, None] & (columns < size + 1)"
    with mutated("kernels.normalize.kernel", old, new, tmp_path), checked_addresses() as faults:
        kernel.forward(torch.randn(3, 5), None, None, 0.0, EPS)
    assert "load of 4 bytes" in faults


def test_operations_are_registered_rightly():
    ids, table, grad = make_embedding(5, 12)
    for x, own_ids in ((table, ids), (grad, None)):
        torch.library.opcheck(fused.forward, (x.clone().requires_grad_(), own_ids, SEED, 0.2, EPS))
        torch.library.opcheck(fused.backward, (grad, x, own_ids, SEED, 0.2, EPS))
    torch.library.opcheck(fused.add_rows, (table, ids.flatten(), grad.flatten(0, 1)))
    torch.library.opcheck(fused_dropout.forward, (table.clone().requires_grad_(), SEEDS, 0.2, torch.float32))
    torch.library.opcheck(fused_dropout.backward, (torch.randn(4, 7, 12), SEEDS, 0.2, torch.float32))


def test_a_process_wants_them_or_does_without():
    set_default_backend("triton")
    assert not is_fused(CPU, 64)
    assert not are_dropouts_fused(CPU)
    wanted.use_fused(["normalize", "dropout"])
    assert is_fused(CPU, 8192)
    assert not is_fused(CPU, 8193)
    assert are_dropouts_fused(CPU)
    assert not is_fused(CPU, 64, backend="torch")
    assert not are_dropouts_fused(CPU, backend="torch")


def test_dropouts_of_more_elements_than_int32_counts_are_refused():
    with pytest.raises(ValueError, match="2147483648 elements"):
        dropout_kernel.forward(torch.empty(2**31, device="meta"), SEEDS, 0.1, torch.bfloat16)


@pytest.mark.parametrize("shape", [(5, 7), (64, 33)])
def test_dropout_by_several_masks_is_dropout_by_each(shape):
    """One block and several; seeds that stand apart."""
    x = torch.randn(shape).requires_grad_()
    spread = SEEDS.repeat_interleave(3, dim=0)[::3]
    result = dropouts(x, spread, 0.3, torch.float32)
    expected = torch.stack([dropout(x, seed, 0.3) for seed in SEEDS])
    assert torch.equal(result, expected)
    grad = torch.randn(4, *shape)
    (actual,), (of_definition,) = (torch.autograd.grad(each, x, grad) for each in (result, expected))
    torch.testing.assert_close(actual, of_definition)


# No bug writes out of bounds: that would crash the tests, not fail them.
MUTANTS = {
    "rows of the table in order": ("tl.load(ids_ptr + row, mask=is_row, other=0).to(tl.int64)", "row % 7"),
    "no GELU": ("x = x * gelu_share(x, False)\n    result", "x = x\n    result"),
    "no GELU in the backward": ("activation = x * share", "activation = x"),
    "GELU's slope left out": ("of_x = of_x * gelu_slope(x, share, False)", "of_x = of_x * share"),
    "mean of one more": ("mean = tl.sum(x, axis=1) / size", "mean = tl.sum(x, axis=1) / (size + 1)"),
    "padding in the variance": ("tl.where(is_inside, x - mean[:, None], 0.0)", "x - mean[:, None]"),
    "no eps": ("/ size + eps)", "/ size)"),
    "what is kept not scaled": ("tl.where(kept, x * keep_scale, 0.0)", "tl.where(kept, x, 0.0)"),
    "gradients not dropped": (
        "grad = _dropped(grad, row, columns, size, seed_ptr, threshold, keep_scale)", "grad = grad * keep_scale"
    ),
    "the mask of other rows": ("row[:, None] * size + columns[None, :], seed_ptr", "row[:, None] + columns, seed_ptr"),
    "LayerNorm without its mean": ("(grad - mean - normalized * along)", "(grad - normalized * along)"),
    "LayerNorm without its direction": ("(grad - mean - normalized * along)", "(grad - mean)"),
    "LayerNorm without its scale": ("of_x = inverse_std * (", "of_x = ("),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bugs_are_found(name, tmp_path):
    case = make_embedding(9, 12)
    if name == "no eps":
        case[1].mul_(1e-3)
    with mutated("kernels.normalize.kernel", *MUTANTS[name], tmp_path), pytest.raises(AssertionError):
        assert_right(case, 0.2)


ADDING_MUTANTS = {
    "the first groups alone": ("while goes_on:", "while group < tl.program_id(0) + 1:"),
    "an id begins at each place": ("if begins | (first % ROWS == 0):", "if begins | (first >= 0):"),
    "an id begins nowhere but there": ("if begins | (first % ROWS == 0):", "if begins:"),
    "gradients in the order of ids": ("tl.load(order_ptr + places, mask=is_own, other=0)", "places"),
    "those of all ids": ("mask=places < rows, other=-1) == own)", "mask=places < rows, other=-1) >= 0)"),
    "overwritten": ("tl.load(target_ptr, mask=is_column, other=0.0) + total", "total"),
    "overwritten by parts": ("tl.load(target_ptr, mask=is_column, other=0.0) + (last", "(last"),
    "parts in each other's place": ("2 * group + begins.to(tl.int32)", "2 * group + 1 - begins.to(tl.int32)"),
    "the last group's part left out": ("(last + tl.sum(sums, axis=0))", "tl.sum(sums, axis=0)"),
    "parts added twice": ("if (own == before) & ((since != own) | (earlier != own)):", "if own == before:"),
    "parts of an id that fills its first group": ("(since != own) | (earlier != own)", "since != own"),
    "the first columns alone": (
        "group = first // ROWS\ncolumns = tl.program_id(1) * BLOCK", "group = first // ROWS\ncolumns = 0 * BLOCK"
    ),
    "parts of the first columns alone": (
        "(earlier != own)):\ncolumns = tl.program_id(1) * BLOCK", "(earlier != own)):\ncolumns = 0 * BLOCK"
    ),
}  # fmt: skip


def adds_right():
    kernel.add_rows.__globals__["ADDED_ROWS"] = 4  # the mutant's
    test_gradients_of_rows_are_added_to_those_of_a_table(18)
    test_gradients_wider_than_a_program_are_added()


@pytest.mark.parametrize("name", ADDING_MUTANTS)
def test_planted_bugs_in_adding_are_found(name, tmp_path):
    with mutated("kernels.normalize.kernel", *ADDING_MUTANTS[name], tmp_path), pytest.raises(AssertionError):
        adds_right()


KEPT = "kept = keep_mask(first_words(offsets, seed_ptr), seed_ptr, threshold)"
SEED_PTR = "seed_ptr = seeds_ptr + mask * seed_stride"
DROPOUT_MUTANTS = {
    "one mask for all": (f"{SEED_PTR}\n{KEPT}\nresult", f"seed_ptr = seeds_ptr\n{KEPT}\nresult"),
    "one mask for all gradients": (f"{SEED_PTR}\n{KEPT}\ngrad", f"seed_ptr = seeds_ptr\n{KEPT}\ngrad"),
    "seeds side by side": (f"{SEED_PTR}\n{KEPT}\nresult", f"seed_ptr = seeds_ptr + mask * 2\n{KEPT}\nresult"),
    "not scaled": ("tl.where(kept, x * keep_scale, 0.0)", "tl.where(kept, x, 0.0)"),
    "gradients not dropped": ("tl.where(kept, grad * keep_scale, 0.0)", "grad * keep_scale"),
    "the first mask's gradient": ("grad_ptr += size", "grad_ptr += 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", DROPOUT_MUTANTS)
def test_planted_bugs_in_dropout_are_found(name, tmp_path):
    assert all(comparison.passed for comparison in dropout_check.compare_dropouts(CPU, torch.float32))
    with mutated("kernels.dropout.kernel", *DROPOUT_MUTANTS[name], tmp_path):
        assert dropout_kernel.BLOCK == 1024
        with pytest.raises(AssertionError):
            test_dropout_by_several_masks_is_dropout_by_each((64, 33))
        assert not all(comparison.passed for comparison in dropout_check.compare_dropouts(CPU, torch.float32))


def test_the_check_finds_them_too(tmp_path):
    def passed():
        yield from check.compare_embedding(CPU, 5, 12)
        yield from check.compare_activation(CPU, 5, 12, torch.float32)
        yield from check.compare_table(CPU, 150, 260)

    assert all(comparison.passed for comparison in passed())
    with mutated("kernels.normalize.kernel", *MUTANTS["LayerNorm without its mean"], tmp_path):
        verdicts = [comparison.passed for comparison in passed()]
    assert verdicts == [True, False, True, False, True]
    for name in ("what is kept not scaled", "gradients not dropped"):
        with mutated("kernels.normalize.kernel", *MUTANTS[name], tmp_path):
            verdicts = [comparison.passed for comparison in passed()]
        assert not any(verdicts[1:4:2]), f"{name}: both gradients"
    for name in ("overwritten", "parts added twice", "the first columns alone"):
        with mutated("kernels.normalize.kernel", *ADDING_MUTANTS[name], tmp_path):
            assert [comparison.passed for comparison in passed()] == [True] * 4 + [False], name
