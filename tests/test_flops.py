"""The FLOP formula against PyTorch's FLOP counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gptbert.model import GPTBert
from gptbert.monitoring import flops
from gptbert.monitoring.flops import forward_flops, training_flops
from tests.conftest import TINY

ROWS, LENGTH = 3, 24


def test_the_formula_is_what_the_encoder_does():
    model = GPTBert(TINY)
    ids = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:  # without layer weighting's matrix-vector products
        model.encode(ids, ids, causal=True)
    positions = 2 * TINY.position_bucket_size - 1
    vectors = 2 * TINY.num_hidden_layers * positions * TINY.hidden_size * 2 * TINY.hidden_size  # once for all tokens
    assert counter.get_total_flops() == ROWS * LENGTH * forward_flops(TINY, LENGTH, 0) + vectors


def test_the_head_counts_for_labeled_tokens_only():
    difference = forward_flops(TINY, LENGTH, 0.25) - forward_flops(TINY, LENGTH, 0)
    assert difference == 0.25 * (2 * TINY.hidden_size**2 + 2 * TINY.hidden_size * TINY.vocab_size)
    assert training_flops(TINY, LENGTH, 0.25) == 3 * forward_flops(TINY, LENGTH, 0.25)


@pytest.mark.parametrize("quick", [False, True])
def test_the_best_rate_of_products_is_2n3_over_the_shortest_time(monkeypatch, quick):
    """Each product advances the clock by a set time, and only the fastest of each size may count."""
    clock, products = [0.0], []

    def product(left, right):
        assert left.shape == right.shape == (len(left), len(left))
        products.append(len(left))
        clock[0] += {16: 4.0, 32: 8.0}[len(left)] * (0.5 if products.count(len(left)) == 3 else 1.0)

    monkeypatch.setattr(flops, "_SIZES", {"cpu": (16, 32)})
    monkeypatch.setattr(flops, "_QUICK_SIZES", {"cpu": (16,)})
    monkeypatch.setattr(torch, "mm", product)
    monkeypatch.setattr(flops.time, "perf_counter", lambda: clock[0])
    rate = flops.measure_matmul_flops(torch.device("cpu"), torch.bfloat16, quick=quick)
    assert rate == (2 * 16**3 / 2.0 if quick else 2 * 32**3 / 4.0)
    assert products == [16] * 4 + ([] if quick else [32] * 4)
