"""Triton kernels against their references, and registered operations, with tensors on the device."""

import importlib
import itertools
import re
from pathlib import Path

import pytest
import torch

import kernels
from kernels import cross_entropy_from_logits, linear, masked_cross_entropy, span_mask
from kernels.attention_context import fused, gated
from kernels.attention_context.bucket_sums import bucket_sums
from kernels.configuration import TRITON_OPERATIONS
from kernels.depth_mix import fused as mixes
from kernels.dropout import fused as dropouts
from kernels.gated_norm import fused as gates
from kernels.lamb import lamb_step
from kernels.lamb import op as lamb
from kernels.masked_cross_entropy import op as cross_entropy
from kernels.masked_cross_entropy import reference
from kernels.normalize import fused as norms
from kernels.span_mask import op as masking
from kernels.span_mask import reference as masking_reference
from kernels.wanted import VARIANTS
from tests.numerics import assert_accurate, assert_near, same

REHEARSED = 6  # comparisons of each check; tests/test_check.py runs all of them
IGNORED = -100
MASKING = {
    "mask_p": 0.15, "random_p": 0.1, "keep_p": 0.1, "mask_token_id": 4, "vocab_size": 30_000, "num_special_tokens": 16,
    "seed": 2**64 - 3,
}  # fmt: skip


def random(*shape, device, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(device, dtype)


def random_ids(vocab_size, *shape, device, seed=0):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed)).to(device)


@pytest.mark.parametrize("operation", TRITON_OPERATIONS)
def test_everything_that_is_checked_before_a_run(operation, device, sized):
    comparisons = importlib.import_module(f"kernels.{operation}.check").comparisons(device, "triton")
    results = list(itertools.islice(comparisons, sized(None, REHEARSED)))
    assert len(results) >= REHEARSED
    assert [result for result in results if not result.passed] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_at_a_models_size(device, sized, dtype):
    """More than 2²⁸ logits and an odd vocabulary, under autocast as in training; two calls give the same bits."""
    rows, vocab_size, hidden_size = sized((10_000, 32_771, 128), (20, 131, 32))
    inputs = {
        "hidden": random(rows, hidden_size, device=device, dtype=torch.bfloat16),
        "weight": (0.1 * random(vocab_size, hidden_size, device=device)).bfloat16(),
        "bias": random(vocab_size, device=device, dtype=torch.bfloat16),
    }
    labels = random_ids(vocab_size, rows, device=device)
    labels[::3] = IGNORED

    def run(function, input_dtype, autocast=False):
        leaves = {name: tensor.to(input_dtype, copy=True).requires_grad_() for name, tensor in inputs.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            result = function(**leaves, labels=labels, ignore_index=IGNORED, z_loss_weight=0.01)
        (result.total / result.count).backward()
        return [result.loss.detach(), result.z_loss.detach(), *(leaf.grad for leaf in leaves.values())], result

    in_bf16 = dtype == torch.bfloat16
    actual, result = run(masked_cross_entropy, torch.float32, autocast=in_bf16)
    again, _ = run(masked_cross_entropy, torch.float32, autocast=in_bf16)
    exact, expected = run(reference.masked_cross_entropy, torch.float64)
    plain, _ = run(reference.masked_cross_entropy, torch.float32, autocast=in_bf16)
    assert same(actual, again)
    assert result.count == expected.count == (labels != IGNORED).sum()
    for name, tensor, *others in zip(("loss", "z_loss", *inputs), actual, exact, plain, strict=True):
        assert_near(tensor, *others, dtype, name=name)


def test_cross_entropy_from_logits_at_a_models_size(device, sized):
    """The gradient overwrites the logits, as in training an exported model."""
    logits = random(*sized((4096, 32_768), (8, 128)), device=device, dtype=torch.bfloat16)
    labels = random_ids(logits.shape[1], len(logits), device=device)
    gradients, losses = [], []
    for function, dtype, options in (
        (cross_entropy_from_logits, torch.bfloat16, {"reuse_logits": True, "backend": "triton"}),
        (reference.cross_entropy_from_logits, torch.float64, {}),
        (reference.cross_entropy_from_logits, torch.bfloat16, {}),
    ):
        leaf = logits.to(dtype, copy=True).requires_grad_()
        result = function(leaf * 1, labels, z_loss_weight=1e-4, **options)
        result.total.backward()
        gradients.append(leaf.grad)
        losses.append(result.loss.detach())
    assert_accurate(*losses, name="loss")
    off_target = torch.arange(logits.shape[1], device=device) != labels[:, None]
    assert_accurate(*gradients, off_target=off_target, name="gradient")


@pytest.mark.parametrize("with_history", [False, True])
def test_masks_of_a_training_step_are_the_cpus(device, sized, with_history):
    rows, length = sized((256, 513), (3, 33))
    tokens = random_ids(MASKING["vocab_size"], rows, length, device="cpu")
    row_ids = random_ids(2**62, rows, device="cpu", seed=1)
    counts = random_ids(5, rows, length, device="cpu", seed=2).to(torch.uint8) if with_history else None
    expected = masking_reference.span_mask(
        tokens, row_ids=row_ids, mask_counts=counts, **MASKING | {"seed": -3}, max_span_length=3
    )
    on_device = None if counts is None else counts.to(device)
    for backend in ("triton", "torch"):
        actual = span_mask(
            tokens.to(device), row_ids=row_ids.to(device), mask_counts=on_device, backend=backend, **MASKING
        )
        assert same([tensor.cpu() for tensor in actual], expected), backend
    assert 0.1 < (expected[1] != IGNORED).double().mean() < 0.2


def test_lamb_takes_the_steps_of_its_reference(device, sized):
    """A model's tensors, some large enough for large chunks; two runs of three steps are bitwise equal."""
    shapes = sized([(9_000_001,), (2560, 768), (768,), (127, 1), ()], [(40_001,), (25, 7), (7,), (1,), ()])
    runs = []
    for backend, dtype in (("triton", torch.float32), ("triton", torch.float32), ("torch", torch.float64)):
        params = [random(*shape, device=device, seed=1).to(dtype) for shape in shapes]
        moments = [[torch.zeros_like(param) for param in params] for _ in range(2)]
        averages = [param.clone() for param in params]
        steps = [torch.zeros((), device=device) for _ in params]
        for step in range(3):
            grads = [random(*shape, device=device, seed=step + 2).to(dtype) for shape in shapes]
            norm = lamb_step(
                params, grads, *moments, steps, lr=0.01, beta1=0.9, beta2=0.98, eps=1e-8, weight_decay=0.1,
                max_grad_norm=1.0, averages=averages, average_decay=0.9, backend=backend,
            )  # fmt: skip
        runs.append([norm, *steps, *params, *moments[0], *moments[1], *averages])
    assert same(runs[0], runs[1])
    for actual, expected in zip(runs[0], runs[2], strict=True):
        torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-4, atol=1e-6)


def opcheck_masking(device):
    tokens, counts = random_ids(90, 3, 33, device=device), random_ids(9, 3, 33, device=device).to(torch.uint8)
    row_ids = torch.arange(3, device=device)
    return masking.span_mask, [(tokens, row_ids, counts, 0.3, 0.1, 0.1, 4, 90, 16, 3, -(2**63), "triton")]


def opcheck_lamb(device):
    lists = [[random(*shape, device=device, seed=seed) for shape in ((300,), (5, 7))] for seed in range(4)]
    lists[3] = [tensor.square() for tensor in lists[3]]
    steps = [torch.zeros((), device=device) for _ in range(2)]
    settings = (0.5, None, 0.9, 0.98, 1e-8, [0.1, 0.0], 1.0, 0.9, None, "triton", None)
    averages = [tensor.clone() for tensor in lists[0]]
    return lamb.lamb_step, [(*lists, steps, averages, torch.zeros((), device=device), None, *settings)]


def opcheck_rows(name):
    def arguments(device):
        logits, labels = random(9, 131, device=device), random_ids(131, 9, device=device)
        segments, scales = random_ids(2, 9, device=device), torch.tensor([0.5, 0.1], device=device)
        rows = (logits, labels, segments, scales, IGNORED, 0.1)
        if name == "cross_entropy_":
            return cross_entropy.cross_entropy_, [(*rows, "triton")]
        return cross_entropy.cross_entropy, [(*rows, needed, "triton") for needed in (True, False)]

    return arguments


def opcheck_masked_cross_entropy(device):
    hidden, weight, bias = random(9, 8, device=device), random(131, 8, device=device), random(131, device=device)
    labels = random_ids(131, 9, device=device)
    products = (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,)
    return cross_entropy.masked_cross_entropy, [
        (hidden, weight, labels, bias, *segments, IGNORED, 0.1, dtype, [True] * 3, "triton")
        for segments in ((None, None), (random_ids(2, 9, device=device), torch.tensor([0.5, 0.1], device=device)))
        for dtype in products
    ]


def opcheck_masked_cross_entropy_in_memory(device):
    _, (first, *_) = opcheck_masked_cross_entropy(device)
    memory = random(131, 8, device=device, seed=1)
    return cross_entropy.masked_cross_entropy_, [(*first, memory, overwrites) for overwrites in (False, True)]


def opcheck_multiply(device):
    return cross_entropy.multiply_, [(random(9, 131, device=device), torch.tensor(0.5, device=device), "triton")]


def opcheck_multiplied(device):
    gradients = [random(9, 8, device=device), random(131, device=device)]
    return cross_entropy.multiplied, [(gradients, torch.tensor(0.5, device=device), "triton")]


def opcheck_sum_rows(device):
    loss, z_loss = (random(9, device=device, seed=seed).abs() for seed in range(2))
    inputs = [random(9, 8, device=device).requires_grad_(), random(131, 8, device=device).requires_grad_()]
    gradients = [torch.ones_like(tensor) for tensor in inputs]
    rows = (loss, z_loss, torch.ones(9, dtype=torch.int32, device=device), random_ids(131, 9, device=device))
    return cross_entropy.sum_rows, [(*rows, None, None, inputs, gradients, IGNORED, 0.1, 131, False, "triton")]


def opcheck_bucket_sums(device):
    position = torch.arange(7, device=device)
    return bucket_sums, [(random(2, 3, 7, 7, device=device), position[:, None] - position + 6, 13)]


def attention_inputs(device, variant=None):
    """Two rows of 24 positions, one causal, with two heads of 32 and 16 position vectors."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    query, key, value = (random(2, 24, 64, device=device, seed=seed).to(dtype) for seed in range(3))
    vectors = [random(16, 64, device=device, seed=seed).to(dtype) for seed in (3, 4)]
    tables = fused.distance_tables(torch.arange(47, device=device) // 4, 16, dtype, variant)
    ids = (torch.arange(24, device=device) // 9).int().repeat(2, 1)
    seed = torch.tensor([77, -5], dtype=torch.int32, device=device)
    return (query, key, *vectors, value, *tables, ids, torch.tensor([False, True], device=device), seed, 0.1, 0.2, 2)


def opcheck_fused_attention(device):
    return fused.forward, [attention_inputs(device, variant) for variant in VARIANTS["attention_context"]]


def opcheck_fused_attention_backward(device):
    calls = []
    for variant in VARIANTS["attention_context"]:
        inputs = attention_inputs(device, variant)
        results = fused.forward(*inputs)
        calls.append((torch.ones_like(results[0]), *inputs[:11], *results, *inputs[11:]))
    return fused.backward, calls


def mix_arguments(device, depth):
    """Of both operations of the mixes, in a forward of two: three rows of eight."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows = [random(3, 8, device=device, seed=seed) for seed in range(6)]
    narrow = [each.to(dtype) for each in rows]
    alpha, values = random(5, device=device), random(3 + mixes.GROUP, 24, device=device).to(dtype)
    partials, inverse_std, bias = random(0, 24, device=device), random(3, device=device), random(8, device=device)
    seed = torch.tensor([77, -5], dtype=torch.int32, device=device) if depth else None
    tensors = (narrow[0] if depth else None, bias if depth else None, rows[1], alpha, seed, values, partials)
    forward = (*tensors, rows[2], narrow[3], inverse_std, depth, 2, 0.2, 1e-5)
    gradients = (rows[4], narrow[5] if depth else None, bias if depth else None, alpha.clone())
    saved = (rows[0], narrow[1], narrow[3], inverse_std, alpha, seed, values, partials)
    return forward, (*saved, *gradients, depth, 2, 0.2)


def opcheck_mixes(operation, index):
    return lambda device: (operation, [mix_arguments(device, depth)[index] for depth in range(3)])


def narrow_random(*shape, device, seed=0):
    """In the dtype of a GPU's products; those of bf16 are wrong in the interpreter."""
    return random(*shape, device=device, seed=seed).to(torch.bfloat16 if device.type == "cuda" else torch.float32)


def opcheck_gated_norm(device):
    return gates.gated_norm, [(narrow_random(2, 5, 24, device=device), None, True, 1e-5)]


def opcheck_gated_norm_backward(device):
    gate = narrow_random(2, 5, 24, device=device)
    normalized, mean, inverse_std = gates.gated_norm(gate, None, True, 1e-5)
    return gates.gated_norm_backward, [(normalized, gate, None, mean, inverse_std, True)]


def gated_attention_inputs(device, variant):
    """Projection and position vectors of `attention_inputs`, side by side; tables, and what follows them."""
    query, key, position_query, position_key, value, *rest = attention_inputs(device, variant)
    projection = torch.cat([query, key, value, query.flip(0)], dim=-1)
    position = torch.cat([position_query, position_key], dim=-1)
    return projection, position, rest[:3], rest[3:]


def opcheck_gated_attention(device):
    calls = []
    for variant in VARIANTS["attention_context"]:
        projection, position, tables, rest = gated_attention_inputs(device, variant)
        calls.append((projection, position, tables[0], variant, *rest, 1e-5))
    return gated.forward, calls


def opcheck_gated_attention_backward(device):
    calls = []
    for variant in VARIANTS["attention_context"]:
        projection, position, tables, rest = gated_attention_inputs(device, variant)
        normalized, *kept = gated.forward(projection, position, tables[0], variant, *rest, 1e-5)
        calls.append((normalized, projection, position, *tables, *rest[:3], *kept, *rest[3:]))
    return gated.backward, calls


def norm_arguments(device):
    """Of the embedding and of the head."""
    seed = torch.tensor([77, -5], dtype=torch.int32, device=device)
    ids = random_ids(11, 2, 5, device=device)
    return [
        (random(11, 24, device=device), ids, seed, 0.1, 1e-5),
        (narrow_random(9, 24, device=device), None, seed, 0.1, 1e-5),
    ]


def opcheck_normalize(device):
    return norms.forward, norm_arguments(device)


def opcheck_normalize_backward(device):
    return norms.backward, [(norms.forward(*each), *each) for each in norm_arguments(device)]


def opcheck_dropouts(device):
    seeds = torch.tensor([[77, -5], [3, 4]], dtype=torch.int32, device=device)
    return dropouts.forward, [(random(16, 24, device=device), seeds, 0.1, torch.float32)]


def opcheck_dropouts_backward(device):
    seeds = torch.tensor([[77, -5], [3, 4]], dtype=torch.int32, device=device)
    return dropouts.backward, [(narrow_random(2, 16, 24, device=device), seeds, 0.1, torch.float32)]


def opcheck_add_rows(device):
    table, ids = random(16, 24, device=device), random_ids(16, 40, device=device)
    return norms.add_rows, [(table, ids, random(40, 24, device=device, seed=1))]


def opcheck_weight_gradient(device):
    rows = narrow_random(16, 32, device=device), narrow_random(16, 24, device=device)
    return linear.weight_gradient, [rows]


def opcheck_add_weight_gradient(device):
    rows = narrow_random(16, 32, device=device), narrow_random(16, 24, device=device)
    return linear.add_weight_gradient, [(*rows, random(32, 24, device=device))]


def opcheck_row_sums(device):
    return linear.row_sums, [(narrow_random(16, 32, device=device),)]


def opcheck_add_row_sums(device):
    rows = narrow_random(16, 32, device=device)
    return linear.add_row_sums, [(rows, random(32, device=device)), (rows, random(32, device=device), rows[:8, :16])]


OPERATIONS_REGISTERED = {
    "fused_gated_norm": opcheck_gated_norm,
    "fused_gated_norm_backward": opcheck_gated_norm_backward,
    "gated_attention": opcheck_gated_attention,
    "gated_attention_backward": opcheck_gated_attention_backward,
    "fused_normalize": opcheck_normalize,
    "fused_normalize_backward": opcheck_normalize_backward,
    "add_rows": opcheck_add_rows,
    "dropouts": opcheck_dropouts,
    "dropouts_backward": opcheck_dropouts_backward,
    "weight_gradient": opcheck_weight_gradient,
    "add_weight_gradient": opcheck_add_weight_gradient,
    "row_sums": opcheck_row_sums,
    "add_row_sums": opcheck_add_row_sums,
    "depth_mix": opcheck_mixes(mixes.forward, 0),
    "depth_mix_backward": opcheck_mixes(mixes.backward, 1),
    "distance_attention": opcheck_fused_attention,
    "distance_attention_backward": opcheck_fused_attention_backward,
    "span_mask": opcheck_masking,
    "lamb_step": opcheck_lamb,
    "cross_entropy": opcheck_rows("cross_entropy"),
    "cross_entropy_": opcheck_rows("cross_entropy_"),
    "masked_cross_entropy": opcheck_masked_cross_entropy,
    "masked_cross_entropy_": opcheck_masked_cross_entropy_in_memory,
    "multiply_": opcheck_multiply,
    "multiplied": opcheck_multiplied,
    "sum_rows": opcheck_sum_rows,
    "bucket_sums": opcheck_bucket_sums,
}


@pytest.mark.parametrize("name", OPERATIONS_REGISTERED)
def test_is_a_well_made_operation(name, device):
    operation, cases = OPERATIONS_REGISTERED[name](device)
    for arguments in cases:
        torch.library.opcheck(operation, arguments)


def test_these_are_all_operations_for_gpus():
    """C++ operations are for CPUs, and registered separately (`kernels.cpp.operation`)."""
    files = Path(kernels.__file__).parent.rglob("*.py")
    found = {name for file in files for name in re.findall(r'custom_op\(\s*"kernels::(\w+)"', file.read_text())}
    assert found == set(OPERATIONS_REGISTERED)
