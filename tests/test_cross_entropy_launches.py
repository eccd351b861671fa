"""Masked cross-entropy's launches and peak memory on a GPU, counted without one.

Tensors are on the meta device, which takes the GPU's code path without data; Triton kernels are counted, not run.
"""

import functools
import importlib
import weakref
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import masked_cross_entropy
from kernels.linear import Packed
from kernels.masked_cross_entropy import inputs as op_inputs
from kernels.masked_cross_entropy import op, reference, sum_kernel

SHAPES = {"N=4096 V=32768": (4096, 768, 32768), "N=32768 V=8192": (32768, 384, 8192)}
Z_WEIGHT = 1e-4
MOST_LAUNCHES = 12


class Launches(TorchDispatchMode):
    """Names of operations that compute or copy: all except views and allocations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        returned = function._schema.returns
        made = [r for r in returned if "Tensor" in str(r.type) and (r.alias_info is None or r.alias_info.is_write)]
        if made and "empty" not in function.__name__:
            self.names.append(function.__name__)
        return function(*args, **(kwargs or {}))


class PeakMemory(TorchDispatchMode):
    """Tracks bytes of storages allocated by operations, without the inputs; `peak` is the maximum allocated at once."""

    def __init__(self, inputs):
        super().__init__()
        self.sizes, self.current, self.peak = {tensor.untyped_storage()._cdata: 0 for tensor in inputs}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.follow(tensor.untyped_storage())
        return result

    def follow(self, storage):
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.current += storage.nbytes()
            self.peak = max(self.peak, self.current)
            weakref.finalize(storage, self.forget, key)

    def forget(self, key):
        self.current -= self.sizes.pop(key)


class Kernel:
    """Replaces a Triton kernel: counts launches."""

    def __init__(self, name, launches):
        self.name, self.launches = name, launches

    def __getitem__(self, grid):
        return lambda *_, **__: self.launches.append(self.name)


@pytest.fixture
def launches(monkeypatch):
    """Names of all launches; operations run their own code instead of their fake implementation."""
    counted = Launches()
    kernel = importlib.import_module("kernels.masked_cross_entropy.kernel")
    for module, name in ((kernel, "rows_kernel"), (sum_kernel, "sum_kernel"), (sum_kernel, "multiply_kernel")):
        monkeypatch.setattr(module, name, Kernel(name, counted.names))
    monkeypatch.setattr(torch, "_assert_async", lambda *_: counted.names.append("_assert_async"))
    for name in ("masked_cross_entropy", "masked_cross_entropy_", "sum_rows", "multiplied"):
        monkeypatch.setattr(op, name, getattr(op, name)._init_fn)
    return counted


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta").requires_grad_(dtype.is_floating_point)


def inputs_of(shape):
    """As in the trainer: hidden states in bf16, weight and bias in fp32."""
    rows, hidden_size, vocab = SHAPES[shape]
    wide = functools.partial(meta, dtype=torch.float32)
    return meta(rows, hidden_size), wide(vocab, hidden_size), meta(rows, dtype=torch.long), wide(vocab)


def forward_and_backward(inputs, monkeypatch):
    """A call as in the trainer, under bf16 autocast; the backward is called as by autograd."""
    hidden, weight, labels, bias = inputs[:4]
    package = importlib.import_module("kernels.masked_cross_entropy")
    monkeypatch.setattr(package, "_compute_dtype", lambda _: torch.bfloat16)
    kept = {}
    sum_rows = op.sum_rows

    def keeping(*arguments):
        kept["inputs"], kept["gradients"] = arguments[6:8]
        return sum_rows(*arguments)

    monkeypatch.setattr(op, "sum_rows", keeping)
    monkeypatch.setattr(package, "_check_grad_output", lambda _: None)
    weight = inputs[4] if len(inputs) > 4 else weight
    result = masked_cross_entropy(hidden, weight, labels, bias, z_loss_weight=Z_WEIGHT, backend="triton")
    context = SimpleNamespace(
        saved_tensors=kept.pop("gradients"),
        dtypes=[tensor.dtype for tensor in kept["inputs"]],
        in_place=False,
        backend="triton",
    )
    with torch.no_grad():
        return op._scaled_gradients(context, torch.ones_like(result.total), None, None)[6]


def packed(inputs):
    """The inputs, and the weight's copy with memory for its gradient: as in steps by the fused kernels."""
    weight = inputs[1]
    weight.grad = torch.empty_like(weight)
    return *inputs, Packed.of([weight], torch.bfloat16).with_gradient(overwrites=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_packed_weight_is_neither_copied_nor_multiplied(launches, monkeypatch, shape):
    """Without the copy in bf16; two more, not counted here, see that the backward is from the total itself."""
    inputs = packed(inputs_of(shape))
    op_inputs.segments_and_scales(inputs[2], None, None)
    with launches:
        gradients = forward_and_backward(inputs, monkeypatch)
    assert [tensor.shape for tensor in gradients] == [tensor.shape for tensor in (inputs[0], inputs[3])]
    assert len(launches.names) + 2 <= MOST_LAUNCHES, launches.names
    assert inputs[1].shape not in [tensor.shape for tensor in gradients]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_call_takes_a_dozen_launches(launches, monkeypatch, shape):
    inputs = inputs_of(shape)
    op_inputs.segments_and_scales(inputs[2], None, None)  # allocate the cached scalars first
    with launches:
        gradients = forward_and_backward(inputs, monkeypatch)
    assert [tensor.dtype for tensor in gradients] == [torch.bfloat16, torch.float32, torch.float32]
    assert [tensor.shape for tensor in gradients] == [tensor.shape for tensor in (inputs[0], inputs[1], inputs[3])]
    assert {"rows_kernel", "sum_kernel", "multiply_kernel", "_assert_async"} <= set(launches.names)
    assert len(launches.names) <= MOST_LAUNCHES, launches.names


@pytest.mark.skipif(torch.__version__.startswith("2.11."), reason="its addmm with out_dtype fails on the meta device")
def test_more_logits_than_a_chunk_holds_go_through_in_chunks_of_one_size(launches, monkeypatch):
    inputs = inputs_of("N=32768 V=8192")
    monkeypatch.setitem(op.CHUNK_BYTES, "gpu", 2**29 // 3)
    with launches:
        forward_and_backward(inputs, monkeypatch)
    assert launches.names.count("rows_kernel") == 4
    assert op._chunk_rows(32768, 8192, torch.bfloat16, inputs[0].device) == 8192


@pytest.mark.parametrize(
    ("shape", "is_packed", "share"),
    [
        ("N=4096 V=32768", False, 0.14),
        ("N=32768 V=8192", False, 0.11),
        ("N=4096 V=32768", True, 0.101),
        ("N=32768 V=8192", True, 0.105),
    ],
)
def test_memory_is_about_a_tenth_of_plain_pytorchs(launches, monkeypatch, shape, is_packed, share):
    """Ours is nearly all bf16 logits, of which PyTorch holds several fp32 copies; and the weight's gradient."""
    inputs = inputs_of(shape)
    given = packed(inputs) if is_packed else inputs
    with PeakMemory([*inputs, *(given[4][1:3] if is_packed else ())]) as memory:
        forward_and_backward(given, monkeypatch)
    hidden, weight, labels, bias = inputs
    with PeakMemory(inputs) as plain:
        narrow = (hidden, weight.bfloat16(), labels, bias.bfloat16())  # as autocast does
        reference.masked_cross_entropy(*narrow, z_loss_weight=Z_WEIGHT).total.backward()
    assert hidden.shape[0] * weight.shape[0] * 2 < memory.peak
    assert memory.peak <= share * plain.peak, f"{memory.peak / 1e6:.0f} of {plain.peak / 1e6:.0f} MB"


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_gradients_that_lie_apart_are_multiplied_too(backend):
    gradients = [torch.randn(7, 20)[:, :11], torch.randn(5)[::2]]
    results = op.multiplied(gradients, torch.tensor(0.5), backend)
    assert all(torch.equal(result, gradient / 2) for result, gradient in zip(results, gradients, strict=True))


@pytest.mark.parametrize(("first", "stride", "gradient_stride"), [(1, 16, 16), (0, 16, 13), (0, 22, 13)])
def test_a_launch_gets_logits_and_a_gradient_with_the_same_places_in_words(monkeypatch, first, stride, gradient_stride):
    """The kernel reads a row's last word whole: of one that is not aligned the rest may lie in a page of others."""
    kernel, launched = importlib.import_module("kernels.masked_cross_entropy.kernel"), []
    recorded = defaultdict(lambda: lambda *tensors, **_: launched.append((tensors[0], tensors[4])))
    monkeypatch.setattr(kernel, "rows_kernel", recorded)
    logits = torch.zeros(first + 4 * stride).as_strided((4, 13), (stride, 1), first)
    gradient = torch.zeros(4 * gradient_stride).as_strided((4, 13), (gradient_stride, 1))
    labels = torch.zeros(4, dtype=torch.int64)
    kernel.rows(logits, labels, labels, torch.ones(1), gradient, -100, 0.0)
    ((logits, gradient),) = launched
    assert logits.data_ptr() % 32 == gradient.data_ptr() % 32 == 0
    assert (logits.stride(0) - gradient.stride(0)) % 8 == 0
