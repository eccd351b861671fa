"""FLOPs by the formula against those that PyTorch counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gptbert.model import GPTBert
from gptbert.monitoring.flops import forward_flops, measure_matmul_flops, training_flops
from tests.conftest import TINY

ROWS, LENGTH = 3, 24


def test_the_formula_is_what_the_encoder_does():
    model = GPTBert(TINY)
    ids = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:  # which knows no matrix–vector products, those of the mixes
        model.encode(ids, ids, causal=True)
    positions = 2 * TINY.position_bucket_size - 1
    vectors = 2 * TINY.num_hidden_layers * positions * TINY.hidden_size * 2 * TINY.hidden_size  # once for all tokens
    assert counter.get_total_flops() == ROWS * LENGTH * forward_flops(TINY, LENGTH, 0) + vectors


def test_the_head_counts_for_labeled_tokens_only():
    difference = forward_flops(TINY, LENGTH, 0.25) - forward_flops(TINY, LENGTH, 0)
    assert difference == 0.25 * (2 * TINY.hidden_size**2 + 2 * TINY.hidden_size * TINY.vocab_size)
    assert training_flops(TINY, LENGTH, 0.25) == 3 * forward_flops(TINY, LENGTH, 0.25)


@pytest.mark.parametrize("quick", [False, True])
def test_the_rate_of_products_is_one(quick):
    assert 1e8 < measure_matmul_flops(torch.device("cpu"), torch.float32, quick=quick) < 1e14
