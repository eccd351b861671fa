"""Span masking as an operation of PyTorch's: registered, compiled, and launched once."""

import importlib

import pytest
import torch

from kernels.span_mask import op
from kernels.span_mask.check import comparisons
from tests.masking import MASK, SPECIAL, VOCAB, mask, some_tokens

pytestmark = pytest.mark.usefixtures("parallel_scans")


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    """Without C++: span masking has no C++ kernel."""
    return request.param


def op_arguments(backend, *, length=33, counts=True):
    tokens, row_ids = some_tokens(3, length), torch.arange(3)
    history = (some_tokens(3, length, lowest=0) % 9).to(torch.uint8) if counts else None
    return tokens, row_ids, history, 0.3, 0.1, 0.1, MASK, VOCAB, SPECIAL, 3, -(2**63), backend


@pytest.mark.parametrize("counts", [True, False])
def test_the_operation_is_registered_rightly(backend, counts):
    arguments = op_arguments(backend, counts=counts)
    torch.library.opcheck(op.span_mask, arguments)
    torch.library.opcheck(op.span_mask, (arguments[0].T.contiguous().T, *arguments[1:]))
    torch.library.opcheck(op.span_mask, (arguments[0][:, 1:20], arguments[1], None, *arguments[3:]))


@pytest.mark.parametrize("counts", [True, False])
def test_compiled_equals_eager_in_every_output(backend, counts):
    torch.compiler.reset()
    tokens, row_ids, history, *_ = op_arguments(backend, counts=counts)

    def function(tokens, mask_p):
        inputs, labels = mask(tokens, row_ids, 2**64 - 3, mask_p=mask_p, mask_counts=history, backend=backend)
        return inputs[:, :-1], labels[:, 1:], (labels != -100).sum()

    compiled = torch.compile(function, fullgraph=True)
    for mask_p in (0.3, 0.25, 0.2):
        for actual, expected in zip(compiled(tokens, mask_p), function(tokens, mask_p), strict=True):
            assert actual.dtype == expected.dtype
            assert torch.equal(actual, expected)


class Recorder:
    """Replaces the kernel: records launches without executing them."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((grid, args, kwargs))


def test_one_launch_whose_kernel_is_compiled_once_for_all_numbers(monkeypatch):
    """Triton compiles once per specialization of argument values; computed here for each launch, as on a GPU."""
    jit = importlib.import_module("triton.runtime.jit")
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    backend = importlib.import_module("triton.compiler").make_backend(target)
    kernel = importlib.import_module("kernels.span_mask.kernel")
    function = kernel.span_mask_kernel
    if not isinstance(function, jit.JITFunction):  # interpreted: rebuild the JITFunction with the same options
        function = jit.JITFunction(function.fn, do_not_specialize=function.kwargs["do_not_specialize"])
    bind = jit.create_function_from_signature(function.signature, function.params, backend)
    recorder = Recorder()
    monkeypatch.setattr(kernel, "span_mask_kernel", recorder)

    def specialization(rows=2, length=128, **changes):
        recorder.launches.clear()
        settings = {"seed": 1, "row_ids": torch.arange(rows), "max_span_length": 3, "backend": "triton"}
        mask(some_tokens(rows, length), **{**settings, **changes})
        ((grid, args, kwargs),) = recorder.launches  # one launch, with one program per row
        assert grid == (rows,)
        _, specialized, options = bind(*args, **kwargs)
        return specialized, options

    usual = specialization()
    assert len(usual[0]) == len(function.params)
    for mask_p in (0.0, 2**-32, 2**-28, 0.15, 0.3, 1.0):
        assert specialization(mask_p=mask_p) == usual
    for random_p, keep_p in ((0.0, 0.0), (2**-32, 0.0), (1.0, 0.0), (0.0, 1.0), (0.123, 0.456)):
        assert specialization(random_p=random_p, keep_p=keep_p) == usual
    for seed in (0, 1, 16, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1):
        assert specialization(seed=seed) == usual
    for row_ids in (torch.tensor([0, 1]), torch.tensor([16, 2**62])):
        assert specialization(row_ids=row_ids) == usual
    for number in (1, 16, 17):
        assert specialization(mask_token_id=number, num_special_tokens=number, vocab_size=2000 + number) == usual
    for spans in (1, 2, 4):
        assert specialization(max_span_length=spans) == usual
    assert specialization(rows=16) == specialization(rows=1) == usual
    assert specialization(length=64) == usual
    assert specialization(length=129) != usual, "not padded"
    assert specialization(max_span_length=5) != usual


def test_the_check_passes_with_the_interpreters_own_scans(parallel_scans, monkeypatch, device):
    interpreter = importlib.import_module("triton.runtime.interpreter")
    monkeypatch.setattr(interpreter.ScanOps, "generic_scan", parallel_scans)
    results = [result for result, _ in zip(comparisons(device, "triton"), range(6), strict=False)]
    assert len(results) == 6
    assert all(result.passed for result in results)
