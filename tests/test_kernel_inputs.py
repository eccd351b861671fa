"""What others than the trainer may hand to the kernels: an error that names it, or the reference's result."""

import pytest
import torch

from kernels import cross_entropy_from_logits, lamb_step, masked_cross_entropy, span_mask
from kernels.add_bias import add_bias
from kernels.attention_context import attention_context
from kernels.attention_context import reference as attention_reference
from kernels.depth_mix import buffer, depth_mix, depth_mix_backward
from kernels.dropout import dropout
from kernels.gated_norm import gated_norm
from kernels.gated_norm import reference as gated_norm_reference
from kernels.lamb import PreparedStep, chunk_table
from kernels.masked_cross_entropy import reference as cross_entropy_reference
from tests.numerics import assert_accurate

SEED = torch.tensor([77, -5], dtype=torch.int32)
ELSEWHERE = torch.device("meta")  # the only other device of every machine
AUTOCAST = torch.autocast("cpu", torch.bfloat16)


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def dtype_of(backend):
    return torch.bfloat16 if backend == "cpp" else torch.float32


# --- labels of cross-entropy


@pytest.mark.parametrize("backend", ["torch", "triton", "cpp"])
@pytest.mark.parametrize(("dtype", "vocab_size"), [(torch.int8, 128), (torch.int16, 32768), (torch.uint8, 200)])
def test_labels_of_any_integers_are_those_numbers(backend, dtype, vocab_size):
    """In int16 the bound 32,768 is −32,768, and −100 is the uint8 156."""
    labels, logits = torch.tensor([3, 100, 127]), random(3, vocab_size, dtype=dtype_of(backend))
    labels = torch.where(labels == 100, 156 if dtype == torch.uint8 else -100, labels)
    result = cross_entropy_from_logits(logits, labels.to(dtype), backend=backend)
    expected = cross_entropy_reference.cross_entropy_from_logits(logits, labels)
    assert result.count == expected.count == (3 if dtype == torch.uint8 else 2)
    torch.testing.assert_close(result.loss, expected.loss)


@pytest.mark.parametrize("backend", ["torch", "triton", "cpp"])
def test_cross_entropy_names_what_it_cannot_take(backend):
    dtype, labels = dtype_of(backend), torch.tensor([1, 2, 3])
    logits, hidden, weight = random(3, 9, dtype=dtype), random(3, 4, dtype=dtype), random(9, 4, dtype=dtype)
    one, scales = torch.zeros(3, dtype=torch.int64), torch.ones(2)
    cases = {
        "labels: torch.float32; expected integers": {"labels": labels.float()},
        "labels: torch.bool; expected integers": {"labels": labels > 1},
        "labels: on meta; expected cpu": {"labels": labels.to(ELSEWHERE)},
        "segments: torch.float32; expected integers": {"segments": one.float(), "scales": scales},
        "segments: on meta": {"segments": one.to(ELSEWHERE), "scales": scales},
        "scales: on meta": {"segments": one, "scales": scales.to(ELSEWHERE)},
    }
    for message, given in cases.items():
        with pytest.raises(ValueError, match=message):
            cross_entropy_from_logits(logits, **{"labels": labels, **given}, backend=backend)
        with pytest.raises(ValueError, match=message):
            masked_cross_entropy(hidden, weight, **{"labels": labels, **given}, backend=backend)
    with pytest.raises(ValueError, match="weight: on meta"):
        masked_cross_entropy(hidden, weight.to(ELSEWHERE), labels, backend=backend)
    with pytest.raises(ValueError, match=r"scale: \(2,\); expected a number or a scalar"):
        cross_entropy_from_logits(logits, labels, scale=scales, backend=backend)


@pytest.mark.parametrize("backend", ["torch", "triton", "cpp"])
def test_logits_that_share_memory_are_not_overwritten(backend):
    row = random(1, 300, dtype=dtype_of(backend)).requires_grad_()
    with pytest.raises(RuntimeError, match="refers to a single memory location"):
        cross_entropy_from_logits(row.expand(3, 300), torch.tensor([1, 2, 3]), reuse_logits=True, backend=backend)


# --- dropout


@pytest.mark.parametrize("probability", [-0.5, 1.0, 1.5, torch.nan])
def test_dropout_refuses_what_is_no_probability(probability):
    with pytest.raises(ValueError, match=r"probability of dropout: .* is not in \[0, 1\)"):
        dropout(torch.ones(9), SEED, probability)
    for backend in ("torch", "cpp"):
        inputs = attention_inputs(dtype_of(backend)) | {"seed": SEED, "dropout_prob": probability}
        with pytest.raises(ValueError, match=r"probability of dropout: .* is not in \[0, 1\)"):
            attention_context(**inputs, backend=backend)


def test_almost_one_drops_almost_all():
    assert dropout(torch.ones(1000), SEED, 1 - 1e-11).count_nonzero() == 0


@pytest.mark.parametrize("seed", [torch.tensor([1, 2]), torch.tensor([1, 2, 3], dtype=torch.int32)])
def test_a_seed_is_two_numbers_of_32_bits(seed):
    message = r"seed: torch.int(64|32) \[[23]\]; expected int32 \[2\]"
    with pytest.raises(ValueError, match=message):
        dropout(torch.ones(9), seed, 0.5)
    for backend in ("torch", "cpp"):
        with pytest.raises(ValueError, match=message):
            attention_context(
                **attention_inputs(dtype_of(backend)) | {"seed": seed, "dropout_prob": 0.5}, backend=backend
            )


# --- attention

HEADS, ROWS, LENGTH, WIDTH, BUCKETS = 2, 2, 9, 8, 5


def attention_inputs(dtype):
    query, key, value = (random(HEADS, ROWS, LENGTH, WIDTH, dtype=dtype, seed=seed) for seed in range(3))
    position_query, position_key = (random(HEADS, BUCKETS, WIDTH, dtype=dtype, seed=seed) for seed in (3, 4))
    position = torch.arange(LENGTH)
    buckets = (position[:, None] - position).clamp(-2, 2) + 2
    tensors = {"query": query, "key": key, "position_query": position_query, "position_key": position_key}
    mask = random(ROWS, LENGTH, LENGTH, seed=5) > -1
    return {**tensors, "value": value, "buckets": buckets, "mask": mask, "seed": None, "dropout_prob": 0.0}


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("shape", [(1, LENGTH, LENGTH), (LENGTH, LENGTH), (ROWS, 1, LENGTH)])
def test_a_mask_is_broadcast(backend, shape):
    inputs = attention_inputs(dtype_of(backend))
    inputs["mask"] = inputs["mask"].flatten()[: torch.Size(shape).numel()].view(shape)
    plain = attention_reference.attention_context(**inputs)
    wide = {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for name, x in inputs.items()
    }
    assert_accurate(attention_context(**inputs, backend=backend), attention_reference.attention_context(**wide), plain)


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_attention_names_what_it_cannot_take(backend):
    inputs = attention_inputs(dtype_of(backend))
    mask, buckets = inputs["mask"], inputs["buckets"]
    for given in ({"mask": mask.long()}, {"mask": mask.float()}, {"buckets": buckets.int()}):
        with pytest.raises(ValueError, match=r"mask, buckets: .*; expected torch.bool, torch.int64"):
            attention_context(**inputs | given, backend=backend)
    for given in ({"buckets": buckets + 1}, {"buckets": buckets - 1}):
        with pytest.raises((ValueError, RuntimeError), match=r"buckets: one is not in 0 … 4|out of bounds"):
            attention_context(**inputs | given, backend=backend)
    for given in ({"mask": mask[:, :4]}, {"buckets": torch.zeros(12, 12).long()}):
        with pytest.raises((ValueError, RuntimeError)):
            attention_context(**inputs | given, backend=backend)


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_attention_under_autocast_takes_fp32(backend):
    names = ("query", "key", "position_query", "position_key", "value")

    def gradients(inputs, function, **settings):
        leaves = {name: inputs[name].clone().requires_grad_() for name in names}
        result = function(**inputs | leaves, **settings)
        (result * random(*result.shape).to(result.dtype)).sum().backward()
        return [leaf.grad for leaf in leaves.values()]

    with AUTOCAST:
        actual = gradients(attention_inputs(torch.float32), attention_context, backend=backend)
    plain = gradients(attention_inputs(torch.bfloat16), attention_reference.attention_context)
    exact = gradients(attention_inputs(torch.float64), attention_reference.attention_context)
    for name, *results in zip(names, actual, exact, plain, strict=True):
        assert results[0].dtype == torch.float32
        assert_accurate(results[0].bfloat16(), *results[1:], name=name)


# --- gated norm, biases, mixes


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_16_bits_has_gated_norms_without_autocast(backend, approximate, dtype):
    gate, weight = random(2, 3, 32, dtype=dtype), random(5, 16, dtype=dtype)
    settings = {"approximate": approximate, "eps": 1e-5}
    result = gated_norm(gate, None, weight, **settings, backend=backend)
    exact = gated_norm_reference.gated_norm(gate.double(), None, weight.double(), **settings)
    assert result.dtype == dtype
    assert_accurate(result, exact, gated_norm_reference.gated_norm(gate, None, weight, **settings))


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_both_factors_of_a_gated_norm_may_differ_in_dtype(backend):
    gate, linear, weight = random(2, 3, 16, dtype=torch.bfloat16), random(4, 2, 3, 4), random(5, 16)
    settings = {"approximate": "none", "eps": 1e-5}
    with AUTOCAST:
        result = gated_norm(gate, linear, weight, **settings, backend=backend)
    exact = gated_norm_reference.gated_norm(gate.double(), linear.double(), weight.double(), **settings)
    plain = gated_norm_reference.gated_norm(gate, linear.bfloat16(), weight.bfloat16(), **settings)
    assert_accurate(result, exact, plain)


@pytest.mark.parametrize("shape", [(4, 1, 3, 4), (2, 2, 3, 4), (4, 2, 2, 4)])
def test_a_factor_of_another_shape_is_not_read_past_its_end(shape):
    gate, linear, weight = (random(*size, dtype=torch.bfloat16) for size in ((2, 3, 16), shape, (5, 16)))
    with pytest.raises(ValueError, match=r"linear: .* beside a gate \[2, 3, 16\]"):
        gated_norm(gate, linear, weight, approximate="none", eps=1e-5, backend="cpp")


def test_a_bias_is_added_to_one_row():
    bias = torch.zeros(7).requires_grad_()
    add_bias(random(7).bfloat16(), bias, backend="cpp").sum().backward()
    assert bias.grad.tolist() == [1.0] * 7


@pytest.fixture
def mixes():
    with AUTOCAST:
        return buffer(3, torch.empty(5000), backend="cpp")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_of_mixes_may_have_another_dtype(mixes, dtype):
    alphas, newest = random(3, 3).to(dtype), random(5000)
    mixed = depth_mix(mixes, newest, alphas[0, :1])
    torch.testing.assert_close(mixed, newest * alphas[0, 0].float())
    of_newest, _ = depth_mix_backward(mixes, newest, alphas, 0, 1)
    torch.testing.assert_close(of_newest, newest * alphas[0, 0].float())


def test_weights_of_mixes_may_be_transposed(mixes):
    alphas, newest = random(3, 3).T, random(5000)
    for depth in (0, 1, 2):
        depth_mix(mixes, newest, alphas[depth, : depth + 1])
    depth_mix_backward(mixes, newest, alphas, 2, 3)
    of_newest, _ = depth_mix_backward(mixes, newest, alphas, 1, 3)
    torch.testing.assert_close(of_newest, (alphas[1, 1] + alphas[2, 1]) * newest, atol=0.05, rtol=0.01)


def test_mixes_stay_within_their_buffer(mixes):
    newest = random(5000)
    with pytest.raises(ValueError, match="alpha: 4 weights for a buffer of 3 representations"):
        depth_mix(mixes, newest, torch.ones(4))
    with pytest.raises(ValueError, match="depth_mix: 500000 elements in a buffer for 6144"):
        depth_mix(mixes, random(500_000), torch.ones(1))
    with pytest.raises(ValueError, match=r"take tensors on the CPU; one of \[1\] is on meta"):
        depth_mix(mixes, newest, torch.ones(1, device=ELSEWHERE))
    with pytest.raises(ValueError, match=r"alphas: \[4, 4\] for a buffer of 3 representations"):
        depth_mix_backward(mixes, newest, torch.ones(4, 4), 0, 1)


# --- LAMB and masks


@pytest.mark.parametrize("backend", ["torch", "triton", "cpp"])
@pytest.mark.parametrize("name", ["params", "steps"])
def test_a_tensor_is_not_stepped_twice(backend, name):
    tensors = {key: [torch.ones(3), torch.ones(3)] for key in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
    tensors["steps"] = [torch.zeros(()), torch.zeros(())]
    tensors[name][1] = tensors[name][0]
    with pytest.raises(ValueError, match=f"{name}: one tensor is there twice"):
        lamb_step(**tensors, lr=0.1, beta1=0.9, beta2=0.99, eps=1e-6, weight_decay=0.1, backend=backend)


@pytest.fixture
def pytorch_defaults():
    chunk_table.make_chunk_table.cache_clear()
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_default_of_pytorch_changes_no_step_of_lamb(pytorch_defaults, dtype):
    """The factor of clipped gradients was rounded to the default dtype, and tables were made on the default device."""
    settings = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-6, "max_grad_norm": 1.0}

    def step():
        lists = [[random(40, seed=seed)] for seed in range(2)] + [[torch.zeros(40)], [torch.zeros(40)]]
        params, grads, *moments, steps = *lists, [torch.zeros(())]
        prepared = PreparedStep(params, *moments, steps, [], [0.1])
        chunk_table.make_chunk_table.cache_clear()
        return params[0], lambda: prepared(grads, **settings)

    (expected, run), (actual, run_with_defaults) = step(), step()
    run()
    torch.set_default_dtype(dtype)
    torch.set_default_device(ELSEWHERE)
    run_with_defaults()
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_masks_have_a_seed_of_64_bits(seed):
    """The bits beyond were dropped, and -1 was 2⁶⁴ − 1."""
    with pytest.raises(ValueError, match=f"seed {seed}: expected 64 bits"):
        span_mask(
            torch.ones(2, 9, dtype=torch.int64),
            mask_p=0.3,
            random_p=0.1,
            keep_p=0.1,
            mask_token_id=4,
            vocab_size=100,
            num_special_tokens=5,
            seed=seed,
            row_ids=torch.arange(2),
        )
