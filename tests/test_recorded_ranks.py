"""Recorded steps on several ranks: what DDP does, and resumed to the bit."""

import itertools
from contextlib import nullcontext
from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from gptbert.checkpoint.folder import list_checkpoints
from gptbert.command_line import parse
from gptbert.config import TrainConfig
from gptbert.data import objectives
from gptbert.data.hybrid_plan import HybridPlan
from gptbert.data.inputs import Inputs
from gptbert.data.micro_batch import MicroBatches
from gptbert.distributed.world import connect
from gptbert.trainer import Trainer
from gptbert.training.step import EagerStep, RecordedStep
from kernels import wanted
from kernels.backend import set_default_backend
from tests.runs import assert_same_checkpoint, flags, on_ranks, train, write_inputs
from tests.test_recorded_step import FEW_ROWS, steps_of, wide_model


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("recorded"), train_characters=30_000)


def ranks_of_both_kinds(rank, inputs, settings, results):
    """Gradient norms and weights after three steps: recorded twice, and with DDP."""
    ends = []
    configs = [
        parse(TrainConfig, flags(inputs, cuda_graph=mode, no_compile=True, timeout=60, **settings))
        for mode in ("on", "on", "off")
    ]
    with connect(configs[0]) as world:
        for config in configs:
            trainer = Trainer(config, Inputs.open(config), HybridPlan(config, world.world_size), world)
            trainer.micro_batches.has_fixed_shapes = True
            is_recorded = config.cuda_graph == "on"
            assert isinstance(trainer.training_step, RecordedStep if is_recorded else EagerStep)
            assert isinstance(trainer.training_step.parallel_model, DistributedDataParallel) is not is_recorded
            norms, *weights = steps_of(trainer, range(3))[0]
            ends.append(
                [norms.tolist(), torch.cat([weight.detach().double().flatten() for weight in weights]).tolist()]
            )
            del trainer  # before the process group is destroyed
    results.put((rank, ends))


@pytest.mark.parametrize("settings", [{"hybrid_mode": "batch"}, {"hybrid_numerator": 1, "hybrid_denominator": 2}])
def test_ranks_with_gradients_in_one_buffer_do_what_ddp_does(inputs, settings):
    settings |= {"config_file": inputs / "no_dropout.json", "optimizer": "lamb", "local_batch_size": 4}
    said = on_ranks(2, ranks_of_both_kinds, inputs, settings)
    assert said[0][0] == said[0][1], "the same bits between runs"
    for recorded, ddp in itertools.chain(*(zip(said[rank][0], said[rank][2], strict=True) for rank in said)):
        torch.testing.assert_close(torch.tensor(recorded), torch.tensor(ddp), rtol=1e-6, atol=1e-6)


def ranks_that_overwrite(rank, inputs, settings, results):
    """Gradient norms and weights after two steps by fused kernels, which overwrite gradients or add to zeros."""
    set_default_backend("triton")
    wanted.use_fused(("gated_norm", "normalize"))
    objectives.span_mask = partial(objectives.span_mask, backend="torch")  # as in `quick_masks`
    config = parse(TrainConfig, flags(inputs, cuda_graph="on", no_compile=True, timeout=60, **settings))
    ends = []
    with connect(config) as world:
        for overwrites in (True, False):
            torch.manual_seed(rank)  # of dropout's seeds
            with nullcontext() if overwrites else patch.object(MicroBatches, "are_single", new=False):
                trainer = Trainer(config, Inputs.open(config), HybridPlan(config, world.world_size), world)
            trainer.micro_batches.has_fixed_shapes = True
            assert any(packed.overwrites for packed in trainer.training_step._weights._all()) is overwrites
            norms, _, _, *weights = steps_of(trainer, range(2))[0]
            ends.append([norms.tolist(), torch.cat([weight.detach().flatten() for weight in weights]).tolist()])
            del trainer  # before the process group is destroyed
    results.put((rank, ends))


def test_ranks_overwrite_the_sums_of_the_step_before(inputs):
    settings = FEW_ROWS | {"local_batch_size": 4, "hybrid_mode": "batch", "config_file": wide_model(inputs)}
    said = on_ranks(2, ranks_that_overwrite, inputs, settings)
    assert said[0] == said[1], "the same update on every rank"
    for actual, expected in zip(*said[0], strict=True):
        torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "changes", [{"cuda_graph": "on"}, {"cuda_graph": "off"}, {"parallel": "fsdp"}], ids=["buffer", "ddp", "fsdp"]
)
def test_gradients_may_travel_in_bf16(inputs, changes):
    ends = {}
    settings = {"hybrid_mode": "batch", "max_steps": 4, "no_compile": True, "optimizer": "adamw"}
    for dtype in ("fp32", "bf16"):
        name = f"travel-{dtype}-{'-'.join(changes.values())}"
        records = train(inputs, name, 2, reduce_dtype=dtype, **settings, **changes)
        ends[dtype] = [record["train/gradient_norm"] for record in records if "train/gradient_norm" in record]
    assert ends["bf16"] != ends["fp32"]
    torch.testing.assert_close(ends["bf16"], ends["fp32"], rtol=0.02, atol=0)


def test_recorded_ranks_are_resumed_to_the_bit(inputs):
    settings = {"hybrid_mode": "batch", "cuda_graph": "on", "no_compile": True, "max_steps": 6, "save_every": 3}
    settings |= {"validate_every": 2, "seq_length_growth": True, "keep_checkpoints": 9}
    train(inputs, "whole-ranks", 2, **settings)
    middle = inputs / "runs" / "whole-ranks" / "checkpoints" / "step_00000003"
    train(inputs, "resumed-ranks", 2, **settings, resume=middle)
    ends = [list_checkpoints(inputs / "runs" / name)[-1] for name in ("whole-ranks", "resumed-ranks")]
    assert_same_checkpoint(*ends)
