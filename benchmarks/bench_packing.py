"""Packing on one core must be faster than any accelerator; the bar is 20 million tokens per second."""

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from gptbert.data.mixture import Mixture
from gptbert.data.packing import RowStream
from gptbert.data.token_store import TokenStore


def stream(mean_length: int, num_tokens: int = 20_000_000) -> RowStream:
    """Documents of 1 … 2 · mean_length tokens, with the order of the first epoch already drawn."""
    lengths = np.random.default_rng(0).integers(1, 2 * mean_length, size=num_tokens // mean_length)
    tokens = (np.arange(lengths.sum()) % 8000 + 16).astype(np.uint16)
    rows = RowStream(TokenStore([tokens], [np.cumsum([0, *lengths])], 8192, None), seq_length=128)
    rows.rows(0, 1)
    return rows


@pytest.mark.parametrize("mean_length", [10, 100, 1000])
@pytest.mark.parametrize("num_rows", [32, 256])
def test_packing(benchmark: BenchmarkFixture, mean_length: int, num_rows: int) -> None:
    """One call of `RowStream.rows`."""
    rows = stream(mean_length)
    slots = iter(range(0, rows.slots_per_epoch - num_rows, num_rows))
    benchmark.pedantic(lambda: rows.rows(next(slots), num_rows), rounds=200, warmup_rounds=5)
    if benchmark.stats:
        benchmark.extra_info["million tokens/s"] = num_rows * 128 / benchmark.stats["median"] / 1e6


@pytest.mark.parametrize("num_corpora", [2, 8])
@pytest.mark.parametrize("num_rows", [32, 256])
def test_packing_of_a_mixture(benchmark: BenchmarkFixture, num_corpora: int, num_rows: int) -> None:
    """One call of `Mixture.rows`, of documents of 1,000 tokens."""
    rows = Mixture([stream(1000, 5_000_000) for _ in range(num_corpora)], range(1, num_corpora + 1))
    slots = iter(range(0, 10**6, num_rows))
    benchmark.pedantic(lambda: rows.rows(next(slots), num_rows), rounds=200, warmup_rounds=5)
    if benchmark.stats:
        benchmark.extra_info["million tokens/s"] = num_rows * 128 / benchmark.stats["median"] / 1e6
