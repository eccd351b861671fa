"""Counts of how often each token was masked."""

import torch

from gptbert.command_line import parse
from gptbert.config import TrainConfig
from gptbert.data.mask_history import MaskHistory
from gptbert.distributed.world import World, connect
from kernels import IGNORE_INDEX
from tests.runs import on_ranks

WORLD = World(0, 1, torch.device("cpu"))


def test_counts_labels_by_their_place_in_the_store():
    history = MaskHistory(10, WORLD)
    positions = torch.tensor([[-1, 3, 4], [7, -1, 9]])
    labels = torch.tensor([[IGNORE_INDEX, 50, IGNORE_INDEX], [60, IGNORE_INDEX, 70]])
    for _ in range(2):
        history.update(positions, labels, capacity=4)
    assert history.lookup(torch.arange(10)).tolist() == [0, 0, 0, 2, 0, 0, 0, 2, 0, 2]
    assert history.lookup(positions).shape == positions.shape


def test_counts_stay_at_their_largest_value():
    history = MaskHistory(2, WORLD)
    for _ in range(300):
        history.update(torch.tensor([[1]]), torch.tensor([[9]]), capacity=1)
    assert history.lookup(torch.tensor([0, 1])).tolist() == [0, 255]


def test_a_rank_without_rows_counts_nothing():
    history = MaskHistory(3, WORLD)
    nothing = torch.full((0, 5), IGNORE_INDEX)
    history.update(nothing, nothing, capacity=2)
    assert history.counts[:3].sum() == 0


def count_on_ranks(rank, results):
    required = [f"--{name}=none" for name in ("train_path", "valid_path", "config_file", "tokenizer_path")]
    with connect(parse(TrainConfig, ["--device=cpu", "--cpu_threads=1", *required])) as world:
        history = MaskHistory(5, world)
        rows = slice(rank, None)  # of the second rank, one row less
        positions, labels = torch.tensor([[0, 1], [2, 3]]) + rank, torch.tensor([[9, IGNORE_INDEX], [9, 9]])
        history.update(positions[rows], labels[rows], capacity=2)
        results.put((rank, history.counts[:5].tolist()))


def test_two_ranks_count_the_masks_of_both():
    assert on_ranks(2, count_on_ranks) == {rank: [1, 0, 1, 1, 1] for rank in range(2)}
