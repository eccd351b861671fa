"""The checks of Triton's kernels in bf16, which GPUs run, in an interpreter that computes with bf16 as they do.

`kernels.check` on a CPU compares in fp32 alone. Where a bound for bf16 were wrong, a GPU would be the first to say so.
"""

import itertools
from functools import partial

import pytest
import torch

from kernels import backend
from kernels.attention_context import check as attention_context
from kernels.attention_context import kernel as attention_kernel
from kernels.depth_mix import check as depth_mix
from kernels.depth_mix import kernel as depth_mix_kernel
from kernels.dropout import check as dropout
from kernels.gated_norm import check as gated_norm
from kernels.gated_norm import kernel as gated_norm_kernel
from kernels.masked_cross_entropy import check as masked_cross_entropy
from kernels.normalize import check as normalize
from kernels.normalize import kernel as normalize_kernel
from kernels.wanted import VARIANTS
from tests import test_fused_attention, test_fused_gated_norm, test_fused_mixes
from tests.interpreted_bf16 import bf16_as_on_gpus, to_bf16, to_fp32

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def as_on_gpus(monkeypatch):
    monkeypatch.setattr(backend, "stands_in_for_gpu", True)
    with bf16_as_on_gpus():
        yield


def attention(variant, heads, size, length, vectors, has_dropout):
    seed = attention_context._SEED if has_dropout else None
    return attention_context.compare_fused(CPU, heads, size, length, vectors, seed, variant=variant)


def mixes(rows, size, num_mixes, has_dropout):
    return depth_mix.compare_fused(CPU, rows, size, num_mixes, torch.bfloat16, has_dropout=has_dropout)


def gates(rows, size, is_tanh):
    return gated_norm.compare_fused(CPU, rows, size, torch.bfloat16, is_tanh=is_tanh)


def activations(rows, size, has_dropout):
    return normalize.compare_activation(CPU, rows, size, torch.bfloat16, has_dropout=has_dropout)


from_logits = partial(masked_cross_entropy._from_logits, CPU, "triton", torch.bfloat16)
from_hidden = partial(masked_cross_entropy._from_hidden, CPU, "triton", torch.bfloat16)
CHECKS = {
    **{f"attention {variant} {case}": partial(attention, variant, *case)
       for variant in VARIANTS["attention_context"] for case in attention_kernel.CHECKED},
    **{f"mixes {case}": partial(mixes, *case) for case in depth_mix_kernel.CHECKED},
    # as before a run of one layer
    **{f"mixes of one layer, D={size}": partial(mixes, 300, size, 2, has_dropout=True) for size in (48, 96, 192)},
    **{f"gates {case}": partial(gates, *case) for case in gated_norm_kernel.CHECKED},
    **{f"activations {case}": partial(activations, case[0], case[1], case[3])
       for case in normalize_kernel.CHECKED if not case[2]},
    "dropouts": partial(dropout.compare_dropouts, CPU, torch.bfloat16),
    **{f"logits V={size}": partial(from_logits, size) for size in masked_cross_entropy._VOCAB_SIZES},
    "logits of segments": partial(from_logits, 4500, has_segments=True),
    **{f"hidden states, {segments}": partial(from_hidden, has_segments=segments) for segments in (False, True)},
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKS)
def test_checks_pass_in_bf16(name):
    results = list(CHECKS[name]())
    assert len(results) >= 2
    for result in results:
        assert result.passed, f"{result.name}: error {result.error:.2e}, allowed {result.bound:.2e}"


def passes(results):
    return all(result.passed for result in results)


@pytest.mark.parametrize("mutant", test_fused_attention.MUTANTS)
def test_planted_bugs_in_attention_do_not_pass(mutant, monkeypatch, tmp_path):
    test_fused_attention.use_small_tiles(monkeypatch)
    length = 20 if mutant in test_fused_attention.IN_SHORT_ROWS else 40
    with test_fused_attention.planted(*test_fused_attention.MUTANTS[mutant], tmp_path):
        assert not passes(attention(VARIANTS["attention_context"][0], 1, 32, length, 16, has_dropout=True))


NEED_ZEROS = {"no eps"}
TOO_SMALL_FOR_BF16 = {"GELU's slope without its curve"}


@pytest.mark.parametrize("mutant", sorted(test_fused_mixes.MUTANTS.keys() - NEED_ZEROS))
def test_planted_bugs_in_mixes_do_not_pass(mutant, tmp_path):
    with test_fused_mixes.planted_in_a_small_case(mutant, tmp_path):
        assert not passes(mixes(3, 12, 7, has_dropout=True))


@pytest.mark.parametrize("mutant", sorted(test_fused_gated_norm.MUTANTS.keys() - NEED_ZEROS - TOO_SMALL_FOR_BF16))
def test_planted_bugs_in_gates_do_not_pass(mutant, tmp_path):
    with test_fused_gated_norm.planted(mutant, tmp_path):
        cases = itertools.product((20, 300), (False, True))
        assert not all(passes(gates(3, size, is_tanh)) for size, is_tanh in cases)


def test_numbers_are_rounded_as_pytorch_rounds_them():
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(10_000, generator=generator) * 2.0 ** torch.randint(-140, 127, (10_000,), generator=generator)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 3.4e38, 1e-45, 1 + 2**-8, 1 + 3 * 2**-8])
    numbers = torch.cat([numbers, special])
    rounded = torch.from_numpy(to_fp32(to_bf16(numbers.numpy())))
    assert torch.equal(rounded, numbers.bfloat16().float())
    assert to_fp32(to_bf16(torch.tensor([torch.nan]).numpy())).tolist() != [0.0]
