"""Gradients in one buffer: where they lie, and their sums over ranks."""

import re

import pytest
import torch

from gptbert.command_line import parse
from gptbert.config import TrainConfig
from gptbert.distributed import flat_gradients
from gptbert.distributed.flat_gradients import FlatGradients
from gptbert.distributed.world import World, connect
from gptbert.errors import InputError
from tests.runs import on_ranks

ALONE = World(0, 1, torch.device("cpu"))
REQUIRED = [f"--{name}=none" for name in ("train_path", "valid_path", "config_file", "tokenizer_path")]


def make_params(sizes):
    torch.manual_seed(len(sizes))
    return [torch.nn.Parameter(torch.randn(size)) for size in sizes]


def test_gradients_are_views_that_begin_at_cache_lines():
    params = make_params([(3, 5), (1,), (32,), (7, 9)])
    gradients = FlatGradients(params, ALONE)
    assert gradients.buffer.shape == (32 + 32 + 32 + 64,)
    assert gradients.buffer.count_nonzero() == 0
    for _ in range(2):
        sum((param * (index + 1)).sum() for index, param in enumerate(params)).backward()
    for index, param in enumerate(params):
        assert torch.equal(param.grad, torch.full_like(param, 2.0 * (index + 1)))
        assert (param.grad.data_ptr() - gradients.buffer.data_ptr()) % 128 == 0
    assert gradients.buffer.count_nonzero() == sum(param.numel() for param in params), "between them are zeros"
    gradients.zero_()
    assert all(param.grad.count_nonzero() == 0 for param in params)


def sums_on_ranks(rank, dtype, results):
    with connect(parse(TrainConfig, ["--device=cpu", "--cpu_threads=1", *REQUIRED])) as world:
        params = make_params([(10, 10), (3,), (50,)])
        gradients = FlatGradients(params, world, dtype)
        for index, param in enumerate(params):
            param.grad += param.detach() * (rank + 1) + index
        flat_gradients._PIECE = 64  # several pieces, with parameters across their borders
        gradients.all_reduce()
        results.put((rank, [param.grad.tolist() for param in params]))


def orders_on_ranks(rank, results):
    with connect(parse(TrainConfig, ["--device=cpu", "--cpu_threads=1", *REQUIRED])) as world:
        params = make_params([(10, 10), (10, 10)])
        try:
            FlatGradients(params, world, overwritten=params[:rank])
        except InputError as error:
            results.put((rank, str(error)))
        else:
            results.put((rank, ""))


def test_ranks_with_other_orders_of_their_gradients_are_refused():
    """Even where all sizes are the same: the sum would be of different parameters."""
    said = on_ranks(2, orders_on_ranks)
    assert said[0] == said[1]
    assert re.match(r"the processes have their gradients in different orders.*\(unlike rank 0: rank 1\)$", said[0])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_gradients_are_summed_over_ranks(dtype, tolerance):
    said = on_ranks(3, sums_on_ranks, dtype)
    assert said[0] == said[1] == said[2]
    params = make_params([(10, 10), (3,), (50,)])
    for index, (param, found) in enumerate(zip(params, said[0], strict=True)):
        expected = sum(param.detach() * (rank + 1) + index for rank in range(3))
        torch.testing.assert_close(torch.tensor(found), expected, rtol=tolerance, atol=tolerance)
