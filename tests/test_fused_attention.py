"""Attention's Triton kernels in the interpreter, against attention over explicit masks in fp64.

Their whole check runs in tests/test_check.py.
"""

import dataclasses

import pytest
import torch

from gptbert.model import GPTBert
from kernels import wanted
from kernels.attention_context import check, fused, fused_attention, kernel
from kernels.backend import set_default_backend
from tests.conftest import TINY
from tests.mutation import mutated
from tests.numerics import assert_accurate, relative_error
from tests.sanitizer import checked_addresses

CPU = torch.device("cpu")
SEED = torch.tensor([77, -5], dtype=torch.int32)
HEADS, SIZE, VECTORS = 2, 32, 16
VARIANTS = wanted.VARIANTS["attention_context"]


def use_small_tiles(monkeypatch):
    """Tiles of 16, so that short rows have several of them, and few programs, so that each has several tiles."""
    monkeypatch.setattr(fused, "TILE", 16)
    monkeypatch.setattr(kernel, "PROGRAMS", 4)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    use_small_tiles(monkeypatch)


def make_case(rows, length, *, documents=3, seed=0):
    """Inputs as the projections leave them, halves of wider rows; every second row is causal; some padding."""
    generator = torch.Generator().manual_seed(seed)
    width = HEADS * SIZE
    wide = [torch.randn(rows, length, 2 * width, generator=generator) for _ in range(2)]
    vectors = torch.randn(VECTORS, 2 * width, generator=generator)
    tensors = (*wide[0].chunk(2, -1), *vectors.chunk(2, -1), wide[1][..., :width])
    ids = torch.randint(documents, (rows, length), generator=generator).sort(dim=1)[0]
    ids[-1, max(1, length - 5) :] = -1
    distances = torch.arange(1 - length, length)
    buckets = (distances.sign() * distances.abs().float().sqrt().ceil().long()).clamp(-7, 7) + 7
    return tensors, buckets, ids.int(), torch.arange(rows) % 2 == 1


def run(case, *, seed=SEED, prob=0.2, grad=None, variant=None):
    tensors, buckets, ids, is_causal = case
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    tables = fused.distance_tables(buckets, VECTORS, torch.float32, variant)
    output = fused_attention(*tensors, tables, ids, is_causal, seed, prob, scale=0.3, num_heads=HEADS)
    grad = torch.ones_like(output) if grad is None else grad
    return output.detach(), *torch.autograd.grad(output, tensors, grad)


def definition(case, dtype, grad, *, kept=None, prob=0.2):
    """Row by row and head by head, over explicit [T, T] matrices."""
    tensors, buckets, ids, is_causal = case
    tensors = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
    query, key, position_query, position_key, value = tensors
    length = ids.shape[1]
    index = torch.arange(length)
    matrix = buckets[index[:, None] - index + length - 1]
    outputs = []
    for head in range(HEADS):
        columns = slice(head * SIZE, (head + 1) * SIZE)
        for row in range(len(ids)):
            q, k, v = (tensor[row, :, columns] for tensor in (query, key, value))
            of_query = (q @ position_key[:, columns].T).gather(1, matrix)
            of_key = (k @ position_query[:, columns].T).gather(1, matrix.T).T
            scores = 0.3 * (q @ k.T + of_query + of_key)
            see = (ids[row][:, None] == ids[row]) & (ids[row] >= 0)
            see = see & (index[:, None] >= index) if is_causal[row] else see
            weights = scores.masked_fill(~see, -torch.inf).softmax(-1).nan_to_num(0.0)
            if kept is not None:
                weights = weights * kept[head, row] / (1 - prob)
            outputs.append(weights @ v)
    output = torch.stack(outputs).view(HEADS, len(ids), length, SIZE)
    return output.detach(), *torch.autograd.grad(output, tensors, grad.to(dtype))


def assert_near(*results):
    """Gradients of one shape together: the error of PyTorch's sum for one alone is small by chance now and then."""
    parts = [(output, *map(torch.stack, ((q, k, v), (pq, pk)))) for output, q, k, pq, pk, v in results]
    for name, *tensors in zip(("output", "gradients of rows", "gradients of vectors"), *parts, strict=True):
        assert_accurate(*tensors, name=name)


@pytest.mark.parametrize(
    ("documents", "variant", "rows", "length"),
    [
        *((4, "gather", 1, 16), (4, "gather", 3, 17), (4, "gather", 2, 33), (4, "gather", 2, 48), (4, "gather", 1, 63)),
        *((1, "gather", 1, 48), (1, "gather", 2, 33), (40, "gather", 2, 17), (40, "gather", 1, 63)),
        *((4, "load", 2, 17), (4, "load", 1, 48), (40, "load", 1, 63)),
    ],
)
def test_results_and_gradients_are_those_of_the_definition(rows, length, documents, variant):
    case = make_case(rows, length, documents=documents)
    grad = torch.randn(HEADS, rows, length, SIZE, generator=torch.Generator().manual_seed(1))
    actual = run(case, seed=None, grad=grad, variant=variant)
    exact, plain = (definition(case, dtype, grad) for dtype in (torch.float64, torch.float32))
    assert_near(actual, exact, plain)


@pytest.mark.parametrize("variant", VARIANTS)
def test_dropout_is_that_of_the_other_implementations(variant):
    case = make_case(2, 40)
    grad = torch.randn(HEADS, 2, 40, SIZE, generator=torch.Generator().manual_seed(1))
    kept = check.dropout(torch.ones(HEADS, 2, 40, 40), SEED, 0.2) > 0
    actual = run(case, grad=grad, variant=variant)
    exact, plain = (definition(case, dtype, grad, kept=kept) for dtype in (torch.float64, torch.float32))
    assert_near(actual, exact, plain)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_position_that_sees_nothing_has_zeros(variant):
    case = make_case(2, 33)
    output, *gradients = run(case, variant=variant)
    nothing = case[2] < 0
    assert nothing.any()
    assert (output[:, nothing] == 0).all()
    assert all((gradients[index][nothing] == 0).all() for index in (0, 1, 4))


def test_two_calls_give_the_same_bits_whatever_the_other_rows():
    case = make_case(2, 24)
    first, again = run(case), run(case)
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    tensors, *rest = case
    one_row = [tensor[:1] if tensor.ndim == 3 else tensor for tensor in tensors]
    alone = run((one_row, rest[0], *(tensor[:1] for tensor in rest[1:])), seed=None)
    whole = run(case, seed=None)
    assert torch.equal(alone[0], whole[0][:, :1])
    assert torch.equal(alone[1], whole[1][:1])


def test_rows_apart_are_read_where_they_are_and_others_copied(monkeypatch):
    seen = []
    own = kernel.forward
    monkeypatch.setattr(kernel, "forward", lambda *args: (seen.append(args[0].data_ptr()), own(*args))[1])
    case = make_case(1, 33)
    expected = run(case)
    assert seen == [case[0][0].data_ptr()]
    tensors = [tensor.mT.contiguous().mT for tensor in case[0]]  # columns first
    for actual, expected_part in zip(run((tensors, *case[1:])), expected, strict=True):
        assert torch.equal(actual, expected_part)


def test_tensors_that_begin_between_words_are_copied(monkeypatch):
    """The kernels are compiled for addresses of 16 bytes, whatever they get."""
    seen, own_forward, own_backward = [], kernel.forward, kernel.backward

    def note(function, *arguments):
        seen.extend(each for each in arguments if isinstance(each, torch.Tensor) and each.ndim > 1)
        return function(*arguments)

    monkeypatch.setattr(kernel, "forward", lambda *args: note(own_forward, *args))
    monkeypatch.setattr(kernel, "backward", lambda *args: note(own_backward, *args))
    tensors, *rest = make_case(1, 16)
    grad = torch.randn(HEADS, 1, 16, SIZE)

    def shifted(x):
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)

    between = tuple(map(shifted, tensors))
    assert all(tensor.data_ptr() % 16 for tensor in between)
    grads = (grad, shifted(grad.movedim(0, -2).flatten(-2)).unflatten(-1, (HEADS, -1)).movedim(-2, 0))
    first, second = (run((each, *rest), grad=of) for each, of in zip((tensors, between), grads, strict=True))
    assert all(map(torch.equal, first, second))
    assert all(tensor.data_ptr() % 16 == 0 for tensor in seen)


@pytest.mark.parametrize(("rows", "length"), [(1, 16), (2, 17), (2, 50)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_address_lies_in_a_tensor(rows, length, variant):
    with checked_addresses() as faults:
        run(make_case(rows, length), variant=variant)
    assert faults == []
    assert faults.seen > 10_000


def test_an_address_elsewhere_is_seen(tmp_path):
    old, new = "[:, None] < T, other=0.0", "[:, None] < T + 1, other=0.0"
    with planted("tiles", old, new, tmp_path), checked_addresses() as faults:
        run(make_case(1, 17))
    assert "load of 4 bytes" in faults


@pytest.mark.parametrize("variant", VARIANTS)
def test_operations_are_registered_rightly(variant):
    tensors, buckets, ids, is_causal = make_case(1, 16)
    tables = fused.distance_tables(buckets, VECTORS, torch.float32, variant)
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    for seed in (None, SEED):
        torch.library.opcheck(fused.forward, (*leaves, *tables, ids, is_causal, seed, 0.2, 0.3, HEADS))
        detached = [tensor.detach() for tensor in leaves]
        output, lse, table = fused.forward(*detached, *tables, ids, is_causal, seed, 0.2, 0.3, HEADS)
        saved = (*detached, *tables, ids, is_causal, seed, output, lse, table)
        torch.library.opcheck(fused.backward, (torch.ones_like(output), *saved, 0.2, 0.3, HEADS))


def test_compiled_equals_eager():
    case = make_case(2, 20)
    torch.compiler.reset()
    tensors, buckets, ids, is_causal = case
    tables = fused.distance_tables(buckets, VECTORS, torch.float32)

    def function(*tensors):
        return fused_attention(*tensors, tables, ids, is_causal, SEED, 0.2, scale=0.3, num_heads=HEADS) * 2

    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    results = []
    for call in (torch.compile(function, fullgraph=True), function):
        output = call(*leaves)
        results.append([output.detach(), *torch.autograd.grad(output.sum(), leaves)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("wrong", "changes"),
    [
        ("nothing", {}),
        ("the dtype", {"dtype": torch.float64}),
        ("too short", {"length": 15}),
        ("too long", {"length": 2049}),
        ("the heads", {"head_size": 48}),
        ("the vectors", {"num_position_vectors": 63}),
        ("the backend", {"backend": "torch"}),
    ],
)
def test_sizes_that_the_kernels_do_not_take_are_known(monkeypatch, wrong, changes):
    monkeypatch.setattr(wanted, "_wanted", frozenset(wanted.FUSED))
    sizes = {"dtype": torch.float32, "device": CPU, "length": 16, "head_size": 64, "num_position_vectors": 64}
    assert fused.is_fused(**sizes | {"backend": "triton"} | changes) is (wrong == "nothing")


@pytest.fixture
def triton():
    """The fused kernels for models that the test makes."""
    set_default_backend("triton")
    wanted.use_fused(["attention_context"])


def test_a_process_can_do_without(triton):
    sizes = (CPU, torch.float32, 16, 64, 64)
    assert fused.is_fused(*sizes)
    wanted.use_fused([])
    assert not fused.is_fused(*sizes)


def test_a_model_is_the_same_fused_and_not(triton, monkeypatch):
    """Loss and all gradients, with dropout, several documents and padding; checkpointed, the backward runs it again."""
    shape = {
        "hidden_size": 64,
        "num_attention_heads": 2,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
    }
    torch.manual_seed(0)
    model = GPTBert(dataclasses.replace(TINY, **shape))
    for param in model.parameters():
        param.data += 0.05 * torch.randn_like(param)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(16, TINY.vocab_size, (2, 20), generator=generator)
    documents = (torch.arange(20) // 7).repeat(2, 1)
    documents[1, -4:] = -1
    calls, own = [], kernel.forward
    monkeypatch.setattr(kernel, "forward", lambda *args: (calls.append(1), own(*args))[1])
    results = []
    for is_wanted, is_checkpointed in ((False, False), (True, False), (True, True)):
        wanted.use_fused(["attention_context"] if is_wanted else [])
        for block in model.blocks:
            block.is_checkpointed = is_checkpointed
        model.zero_grad()
        torch.manual_seed(5)  # of dropout
        result = model.sums(ids, documents, ids, True, 1e-2)
        result.total.backward()
        results.append([result.total.detach(), *(param.grad.clone() for param in model.parameters())])
    layers = len(model.blocks)
    assert len(calls) == layers + 2 * layers
    names = ["total", *(name for name, _ in model.named_parameters())]
    for name, unfused, once, checkpointed in zip(names, *results, strict=True):
        assert relative_error(once, unfused) < 1e-5, name
        assert torch.equal(once, checkpointed), name


def test_scoring_does_not_take_them():
    set_default_backend("triton")
    assert not fused.is_fused(CPU, torch.float32, 16, 64, 64)


def planted(module, old, new, folder):
    """A bug in one of the operation's modules, or in the hash."""
    name = "kernels.dropout_hash" if module == "dropout_hash" else f"kernels.attention_context.{module}"
    return mutated(name, old, new, folder, users=[kernel, kernel.backward_kernel])


# No bug writes out of bounds: that would crash the tests, not fail them.
MUTANTS = {
    "scores without their factor": ("kernel", "scores * (scale * LOG2_E)", "scores * LOG2_E"),
    "sums not rescaled": ("kernel", "rescale = tl.exp2(largest - shift)", "rescale = tl.exp2(shift - shift)"),
    "sum of the last tile": ("kernel", "total = total * rescale + tl.sum", "total = tl.sum"),
    "what is kept not scaled": ("kernel", "(keep_scale / total)", "(1.0 / total)"),
    "logarithm without its maximum": ("kernel", "tl.where(sees_any, largest, 0.0) + tl.log2", "tl.log2"),
    "nothing dropped": ("kernel", "weights = tl.where(kept, weights, 0.0)", "weights = weights"),
    "a causal row ends a tile early": ("kernel", "tl.where(is_causal, first + N, L)", "tl.where(is_causal, first, L)"),
    "keys from behind": ("kernel", "buckets_ptr, first, column", "buckets_ptr, column, first"),
    "tables exchanged": (
        "tiles", "return table_ptr + (H * d + h * d), table_ptr + h * d",
        "return table_ptr + h * d, table_ptr + (H * d + h * d)",
    ),
    "the future is seen": ("tiles", "columns <= tl.where(is_causal, rows, T)", "columns <= tl.where(is_causal, T, T)"),
    "the future is seen in the backward": (
        "tiles", "columns >= tl.where(is_causal, rows, 0)",
        "columns >= tl.where(is_causal, 0, 0)",
    ),
    "padding sees padding": ("tiles", "own = tl.where(own < 0, -2, own)", "own = own"),
    "later documents are seen": ("tiles", "same = own[:, None] ==", "same = own[:, None] <="),
    "documents out of reach": ("tiles", "(every <= tl.max(own, 0))", "(every < tl.max(own, 0))"),
    "a row's scores by the other's distance": (
        "tiles", "low, high = r0 - c0 + 7, r1 - c1",
        "low, high = c0 - r0 + 7, c1 - r1",
    ),
    "half of the distances": ("tiles", "for turn in tl.static_range(2)", "for turn in tl.static_range(1)"),
    "position scores of rows alone": ("tiles", "of_rows + of_columns", "of_rows"),
    "queries without their sum": ("backward_kernel", "weights * (of_weights - delta[:, None])", "weights * of_weights"),
    "keys without the sum": ("backward_kernel", "weights * (of_weights - delta[None, :])", "weights * of_weights"),
    "queries' gradients not dropped": (
        "backward_kernel", "tl.where(kept, of_weights * keep_scale, 0.0)",
        "of_weights * keep_scale",
    ),
    "keys' gradients not dropped": (
        "backward_kernel", "tl.where(weights > 0.0, of_weights * keep_scale, 0.0)",
        "of_weights * keep_scale",
    ),
    "dropped values have gradients": ("backward_kernel", "tl.maximum(weights, 0.0)", "tl.abs(weights)"),
    "values' gradients not scaled": ("backward_kernel", "of_value * keep_scale", "of_value"),
    "queries without positions": ("backward_kernel", "tl.dot(narrow, position_key, of_query)", "of_query"),
    "keys without positions": ("backward_kernel", "tl.dot(narrow, position_query, of_key)", "of_key"),
    "parts overwritten": ("backward_kernel", "tl.load(pointers) + x", "x"),
    "a causal key's own tile left out": (
        "backward_kernel", "range(tl.where(is_causal, first, 0), L, N,",
        "range(tl.where(is_causal, first + N, 0), L, N,",
    ),
    "another mask": ("dropout_hash", "* 0x85EBCA6B", "* 0x85EBCA69"),
    "the seed's second word left out": ("dropout_hash", "* 0x2C1B3C6D) ^ second_word", "* 0x2C1B3C6D)"),
}  # fmt: skip
MUTANTS_OF_LOADS = {
    "another distance": ("tiles", "(rows - columns) * SIGN", "(columns - rows) * SIGN"),
    "the next distance": ("tiles", "(query - key + (L - 1)), key, zero, -1", "(query - key + L), key, zero, -1"),
    "keys by columns": ("tiles", "return of_queries + tl.trans(of_keys)", "return of_queries + of_keys"),
    "queries by rows": ("tiles", "return tl.trans(of_queries) + of_keys", "return of_queries + of_keys"),
    "queries' products for keys": (
        "tiles", "return of_queries_ptr, of_queries_ptr + tl.cast(B, tl.int64) * (H * T * P)",
        "return of_queries_ptr, of_queries_ptr",
    ),
    "products exchanged": ("kernel", "torch.bmm(query, position_key", "torch.bmm(key, position_key"),
    "another row's products": ("tiles", "tl.cast(h * B + b, tl.int64) * (T * P)", "tl.cast(h * B, tl.int64) * (T * P)"),
    "a key's tile by the query's distance": (
        "tiles", "rows * (2 * N - 1) + columns + N",
        "rows * (2 * N + 1) - columns + N",
    ),
    "halves exchanged": ("tiles", "(half - 1) * N", "(0 - half) * N"),
    "scratch of another size": ("tiles", "scratch_ptr + half * N, 0, 2 * N", "scratch_ptr + half * N, 0, N"),
    "scratch not cleared": ("kernel", "grad.new_zeros(2, groups", "grad.new_ones(2, groups"),
}  # fmt: skip


IN_SHORT_ROWS = {"a causal row ends a tile early"}  # longer ones look for their documents


def a_check(length, variant=VARIANTS[0]):
    """A part of the operation's check: two or three tiles, the last one partial, with dropout; computed when asked."""
    return check.compare_fused(CPU, 1, 32, length, 16, SEED, variant=variant)


@pytest.mark.parametrize("length", [20, 40])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_part_of_the_check_passes(length, variant):
    assert all(result.passed for result in a_check(length, variant))


@pytest.mark.parametrize("mutant", MUTANTS_OF_LOADS)
def test_the_check_rejects_mutants_of_the_variant_without_gathers(tmp_path, mutant):
    with planted(*MUTANTS_OF_LOADS[mutant], tmp_path):
        assert any(not result.passed for result in a_check(40, "load"))


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_check_rejects_mutants(tmp_path, mutant):
    with planted(*MUTANTS[mutant], tmp_path):
        assert any(not result.passed for result in a_check(20 if mutant in IN_SHORT_ROWS else 40))
