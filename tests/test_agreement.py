"""Processes that differ in what must be the same: one line on each of them, before the first step."""

import os

import pytest
import torch

from gptbert.command_line import parse
from gptbert.config import TrainConfig
from gptbert.distributed.agreement import check_same
from gptbert.distributed.world import World
from gptbert.errors import InputError, SharedError
from gptbert.train import train
from tests.runs import flags, on_ranks, write_inputs

SHORT = {"max_steps": 2, "validate_every": 0, "validation_steps": 1, "hybrid_mode": "batch", "no_compile": True}
SHORT |= {"timeout": 30}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("agreement"), train_characters=30_000)


class Three(World):
    """Three ranks of which the last has another second value."""

    def all_gather(self, value):
        return [value, value, [value[0], "other", *value[2:]]]


def test_the_first_value_that_differs_is_named_and_whose_it_is():
    check_same({"a": 1, "b": "other"}, Three(0, 3, torch.device("cpu")))
    with pytest.raises(SharedError, match=r"^b is not the same \(unlike rank 0: rank 2\)$"):
        check_same({"a": 1, "b is not the same": 2, "c": 3}, Three(0, 3, torch.device("cpu")))


def _trained(rank, arguments, variables, results):
    os.environ |= variables[rank]
    try:
        train(parse(TrainConfig, arguments))
    except InputError as error:
        results.put((rank, str(error)))
    else:
        results.put((rank, ""))


def test_kernels_that_differ_are_refused(inputs):
    variables = [{"KERNELS_BACKEND": name, "TRITON_INTERPRET": "1"} for name in ("triton", "torch")]
    arguments = flags(inputs, **SHORT, name="kernels", cuda_graph="on", kernel_check="off")
    said = on_ranks(2, _trained, arguments, variables)
    assert said[0] == said[1]
    assert said[0].startswith("the processes have chosen different kernels; name them with --kernels, or ")
    assert said[0].endswith("(unlike rank 0: rank 1)")
    assert not (inputs / "runs" / "kernels").exists()
