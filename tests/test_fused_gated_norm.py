"""The gated norm's Triton kernels in the interpreter, against the formula in fp64.

Their whole check runs in tests/test_check.py; attention's gated form also in tests/test_fused_attention.py.
"""

import pytest
import torch

from kernels import wanted, whole_rows
from kernels.attention_context import check as attention_check
from kernels.backend import set_default_backend
from kernels.gated_norm import check, fused, gated_norm, is_fused, kernel, op, reference
from kernels.linear import Packed
from tests.mutation import mutated
from tests.numerics import assert_accurate
from tests.sanitizer import checked_addresses

CPU = torch.device("cpu")
EPS = 1e-5
# D: less than a word, odd, one piece, two pieces of which the last is whole and not
SIZES = [1, 7, 16, 255, 300, 320]


def make_case(size, *, separate, rows=5, seed=0):
    """Gate, linear or None, a weight [3, D] and the result's gradient; separate ones as attention leaves them."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(1, rows, (4 if separate else 2) * size, generator=generator)
    linear = 0.3 + torch.randn(1, rows, size, generator=generator)
    weight = torch.randn(3, size, generator=generator)
    gate = wide[..., 3 * size :] if separate else wide
    linear = linear.view(1, rows, 1, size).movedim(-2, 0) if separate else None
    return (gate, linear, weight), torch.randn(1, rows, 3, generator=generator)


def run(case):
    tensors, grad = case
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in tensors]
    gate, linear, weight = leaves
    approximate = "tanh" if linear is None else "none"
    output = op.fused_gated_norm(gate, linear, Packed.of([weight], torch.float32), approximate, EPS)
    return output.detach(), *torch.autograd.grad(output, [leaf for leaf in leaves if leaf is not None], grad)


def definition(case, dtype):
    tensors, grad = case
    leaves = [None if tensor is None else tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
    approximate = "tanh" if leaves[1] is None else "none"
    output = reference.gated_norm(*leaves, approximate=approximate, eps=EPS)
    return output.detach(), *torch.autograd.grad(output, [leaf for leaf in leaves if leaf is not None], grad.to(dtype))


def assert_right(case):
    results = run(case), definition(case, torch.float64), definition(case, torch.float32)
    for index, tensors in enumerate(zip(*results, strict=True)):
        assert_accurate(*tensors, name=str(index))


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", [1, 16])
def test_results_and_gradients_are_those_of_the_formula(monkeypatch, separate, size, rows):
    """A program of one row, as on GPUs, and of several."""
    monkeypatch.setattr(whole_rows, "ROWS_INTERPRETED", rows)
    assert_right(make_case(size, separate=separate))


@pytest.mark.parametrize("magnitude", [0.0, 1e-3, 30.0])
def test_gates_of_any_size(magnitude):
    for separate in (False, True):
        (gate, linear, weight), grad = make_case(20, separate=separate)
        assert_right(((gate * magnitude, linear, weight), grad))


def test_no_rows():
    output, *gradients = run(make_case(16, separate=False, rows=0))
    assert output.shape == (1, 0, 3)
    assert not gradients[-1].any()


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("size", [7, 300])
def test_every_address_lies_in_a_tensor(separate, size):
    with checked_addresses() as faults:
        run(make_case(size, separate=separate))
    assert faults == []
    assert faults.seen > 100


def test_an_address_elsewhere_is_seen(tmp_path):
    old, new = "is_inside = is_row & (columns[piece] < size)", "is_inside = is_row & (columns[piece] < size + 1)"
    with mutated("kernels.gated_norm.kernel", old, new, tmp_path), checked_addresses() as faults:
        run(make_case(7, separate=True))
    assert "load of 4 bytes" in faults


@pytest.mark.parametrize("separate", [False, True])
def test_operations_are_registered_rightly(separate):
    (gate, linear, _), _ = make_case(12, separate=separate)
    torch.library.opcheck(fused.gated_norm, (gate, linear, not separate, EPS))
    normalized, mean, inverse_std = fused.gated_norm(gate, linear, not separate, EPS)
    rest = (gate, linear, mean, inverse_std, not separate)
    torch.library.opcheck(fused.gated_norm_backward, (torch.ones_like(normalized), *rest))


def test_compiled_equals_eager(fresh_compiler):
    def function(gate, linear, weight):
        packed = Packed.of([weight], torch.float32)
        return op.fused_gated_norm(gate, linear, packed, "none", EPS) * 2

    tensors, grad = make_case(12, separate=True)
    ends = []
    for call in (torch.compile(function, fullgraph=True, backend="aot_eager"), function):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        output = call(*leaves)
        ends.append([output.detach(), *torch.autograd.grad(output, leaves, grad)])
    for compiled, eager in zip(*ends, strict=True):
        assert torch.equal(compiled, eager)


def test_a_process_wants_them_or_does_without(monkeypatch):
    set_default_backend("triton")
    assert not is_fused(CPU, torch.float32, 64)
    wanted.use_fused(["gated_norm"])
    assert is_fused(CPU, torch.float32, 64)
    assert not is_fused(CPU, torch.float32, 64, backend="torch")
    assert not is_fused(CPU, torch.bfloat16, 64), "in the interpreter"
    assert is_fused(torch.device("cuda", 0), torch.bfloat16, 8192)
    assert not is_fused(CPU, torch.float32, 8193)
    calls, own = [], kernel.forward
    monkeypatch.setattr(kernel, "forward", lambda *args, **settings: (calls.append(1), own(*args, **settings))[1])
    (gate, _, weight), _ = make_case(16, separate=False)
    packed, settings = Packed.of([weight], torch.float32), {"approximate": "tanh", "eps": EPS}
    with_kernels = gated_norm(gate, None, packed, **settings)
    assert len(calls) == 1
    for given, backend in ((weight, None), (packed, "torch")):
        torch.testing.assert_close(gated_norm(gate, None, given, backend=backend, **settings), with_kernels)
    assert len(calls) == 1


def planted(name, folder):
    """A bug in the kernels, or in GELU."""
    module = "kernels.gelu" if "GELU" in name else "kernels.gated_norm.kernel"
    return mutated(module, *MUTANTS[name], folder, users=[kernel])


# No bug writes out of bounds: that would crash the tests, not fail them.
MUTANTS = {
    "GELU without its cube": ("(x + x * x * x * _CUBE)", "(x + x * x * _CUBE)"),
    "GELU with half of erf": ("0.5 + 0.5 * tl.erf", "0.5 + 0.25 * tl.erf"),
    "GELU's slope without its curve": ("(x * x * _CURVE + _SLOPE)", "_SLOPE"),
    "GELU's slope without the density": ("share + x * (tl.exp(x * x * -0.5) * _DENSITY)", "share"),
    "the first piece twice": ("(BLOCK + tl.arange(0, REST)[None, :],)", "(tl.arange(0, REST)[None, :],)"),
    "mean over the tile": ("mean = mean / size", "mean = mean / (BLOCK + REST)"),
    "variance over the tile": ("variance / size + eps", "variance / (BLOCK + REST) + eps"),
    "padding in the variance": (
        "tl.where(columns[piece] < size, products[piece] - mean[:, None], 0.0)", "products[piece] - mean[:, None]"
    ),
    "no eps": ("variance / size + eps)", "variance / size)"),
    "not centered": ("normalized = (products[piece] - mean[:, None])", "normalized = products[piece]"),
    "not centered again": ("normalized += ((product - mean) * inverse_std,)", "normalized += (product * inverse_std,)"),
    "LayerNorm without its mean": ("- grad_mean - normalized[piece] * along)", "- normalized[piece] * along)"),
    "LayerNorm without its direction": ("- grad_mean - normalized[piece] * along)", "- grad_mean)"),
    "LayerNorm without its scale": ("of_product = inverse_std * (", "of_product = ("),
    "the gate's gradient by its share": ("* gelu_slope(own_gate, share, IS_TANH)", "* share"),
    "the linear's gradient without the gate": ("of_product * own_gate * share)", "of_product * share)"),
    "the stride of one for the other": ("gate_ptr + row * gate_stride, columns, is_row, size, PIECES)\n    grad =",
                                        "gate_ptr + row * linear_stride, columns, is_row, size, PIECES)\n    grad ="),
}  # fmt: skip


def assert_all_right(cases):
    for case in cases:
        assert_right(case)


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bugs_are_found(name, tmp_path):
    cases = [make_case(300, separate=False), make_case(12, separate=True)]
    if name == "no eps":
        (gate, linear, weight), grad = cases[1]
        cases = [((gate * 1e-3, linear, weight), grad)]
    with planted(name, tmp_path), pytest.raises(AssertionError):
        assert_all_right(cases)


def test_the_checks_find_them_too(tmp_path):
    def passed():
        yield from check.compare_fused(CPU, 3, 20, torch.float32, is_tanh=False)
        gated = attention_check.compare_fused(CPU, 1, 32, 20, 16)
        yield from (comparison for comparison in gated if comparison.name.startswith("gated"))

    assert all(comparison.passed for comparison in passed())
    with planted("GELU's slope without the density", tmp_path):
        verdicts = [comparison.passed for comparison in passed()]
    assert not all(verdicts[:4])
    assert not all(verdicts[4:])
