"""How many rows go through the model at once."""

from pathlib import Path

import pytest
import torch

from gptbert.config import TrainConfig
from gptbert.micro_batch import micro_batch_rows

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def config(local_batch_size, seq_length=128):
    return TrainConfig((Path("none"),), *(Path("none"),) * 3, local_batch_size=local_batch_size, seq_length=seq_length)


@pytest.mark.parametrize("device", [CPU, GPU])
def test_tokens_at_a_time_stay_the_same(device):
    assert [micro_batch_rows(config(8), length, device) for length in (128, 256, 512)] == [8, 4, 2]


def test_never_none():
    assert micro_batch_rows(config(1), 512, GPU) == 1
    assert micro_batch_rows(config(8, seq_length=4096), 16384, CPU) == 1


@pytest.mark.parametrize(("threads", "rows"), [(1, 16), (2, 16), (4, 32), (64, 256)])
def test_a_cpu_takes_what_its_threads_share_well(monkeypatch, threads, rows):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert micro_batch_rows(config(256), 128, CPU) == rows
    assert micro_batch_rows(config(256), 128, GPU) == 256
