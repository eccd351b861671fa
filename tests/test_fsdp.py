"""FSDP: the results of one process, with the weights sharded over ranks."""

import traceback
from functools import partialmethod

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map

from gptbert.checkpoint import manifest
from gptbert.checkpoint.checkpoint import load
from gptbert.checkpoint.folder import list_checkpoints
from gptbert.checkpoint.saved_model import load_model
from gptbert.command_line import parse, run_command
from gptbert.config import ModelConfig, TrainConfig
from gptbert.data.hybrid_plan import HybridPlan
from gptbert.data.inputs import Inputs
from gptbert.distributed.fsdp import new_moments, shard_size
from gptbert.distributed.world import World, connect
from gptbert.errors import InputError, LostProcessError
from gptbert.model import GPTBert
from gptbert.monitoring.records import read_records
from gptbert.optim import Lamb, parameter_groups
from gptbert.train import fit
from gptbert.trainer import Trainer
from gptbert.training import compile_choice
from gptbert.training.step import TrainingStep
from gptbert.unshard import UnshardConfig, unshard
from tests.runs import flags, losses, on_ranks, train, write_inputs

CPU = torch.device("cpu")
# ranks have different numbers of micro-batches, in training and in validation
UNEVEN = {"local_batch_size": 3, "global_batch_size": 13, "validation_steps": 1}
# relative, of losses: what fp32 rounding grows to over the steps, 1.1e-5 so far; an error of 1 % comes to 1.1e-4
CLOSE = 4e-5


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("sharding"))


@pytest.fixture(scope="module")
def one(inputs):
    """Records of a single-process run; other tests resume from its checkpoints."""
    settings = {"name": "one", "config_file": inputs / "no_dropout.json", "hybrid_mode": "batch", "save_every": 10}
    fit(parse(TrainConfig, flags(inputs, **UNEVEN | settings)))
    records = read_records(inputs / "runs" / "one" / "metrics.jsonl")
    assert records[0]["train/loss"] > records[-2]["train/loss"] + 0.1, "a run that learns nothing shows nothing"
    return records


def all_losses(records):
    average = [record[key] for record in records for key in record if "validation_ema" in key and "loss" in key]
    assert len(losses(records)) == 3 * 20 + 2 * 2
    assert len(average) == 2 * 2
    return losses(records) + average


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (2, {"hybrid_mode": "batch"}),
        (4, {"hybrid_mode": "rank", "activation_checkpointing": True}),
        (4, {"hybrid_mode": "batch", "shard_size": 2}),
    ],
    ids=["2 ranks", "4 ranks, one masked", "2 copies on 4 ranks"],
)
def test_a_run_does_not_depend_on_sharding(inputs, one, ranks, settings):
    """Losses are those of one process; weights and moments those of as many ranks without sharding, nearly to the bit.

    Another number of ranks adds gradients in another order. Those of the layer weights nearly cancel, and LAMB divides
    them by their size: rounding errors alone moved a weight by 2e-3 in these twenty steps.
    """
    name = f"fsdp-{ranks}-{settings['hybrid_mode']}"
    common = UNEVEN | {"config_file": inputs / "no_dropout.json", "save_every": 10}
    records = train(inputs, name, ranks, **common | settings, parallel="fsdp")
    assert all_losses(records) == pytest.approx(all_losses(one), rel=CLOSE)
    train(inputs, f"not-{name}", ranks, **common, hybrid_mode=settings["hybrid_mode"])
    config = ModelConfig.from_json(inputs / "no_dropout.json")
    ours, theirs = (whole(list_checkpoints(inputs / "runs" / run)[-1], config) for run in (name, f"not-{name}"))
    for weights in ("model", "ema"):
        for key, tensor in getattr(theirs, weights).items():
            torch.testing.assert_close(getattr(ours, weights)[key], tensor, rtol=1e-5, atol=1e-5, msg=key)
    for index, state in theirs.optimizer["state"].items():
        torch.testing.assert_close(ours.optimizer["state"][index], state, rtol=1e-4, atol=1e-6, msg=str(index))


def whole(path, config):
    """A checkpoint's full content on one process."""
    loaded = load(path, config)
    if loaded.shards is None:
        return loaded
    model, ema = GPTBert(config), GPTBert(config)
    moments = new_moments(Lamb(parameter_groups(model, 0.1)))
    return loaded.with_shards_loaded(model.state_dict(), ema.state_dict(), moments)


@pytest.mark.parametrize(
    ("ranks", "settings"), [(1, {}), (4, {"shard_size": 2, "parallel": "fsdp"})], ids=["one process", "2 copies"]
)
def test_shards_are_taken_up_in_other_numbers(inputs, one, ranks, settings):
    """The first half on two ranks with one copy of the weights, the second on other numbers of ranks."""
    common = UNEVEN | {"config_file": inputs / "no_dropout.json", "hybrid_mode": "batch", "save_every": 10}
    half_way = inputs / "runs" / "halves" / "checkpoints" / "step_00000010"
    if not half_way.exists():
        train(inputs, "halves", 2, **common, parallel="fsdp", keep_checkpoints=9)
    records = train(inputs, f"second-half-{ranks}", ranks, **common | settings, resume=half_way)
    wanted = [record for record in one if record["step"] > 10]
    assert len(losses(records)) == 3 * 10 + 2
    assert losses(records) == pytest.approx(losses(wanted), rel=CLOSE)


def test_a_sharded_checkpoint_becomes_an_ordinary_one(inputs, one, capfd):
    """Sharded by two ranks; the weights can also be loaded directly."""
    run = inputs / "runs" / "to-unshard"
    settings = {"config_file": inputs / "no_dropout.json", "max_steps": 2, "hybrid_mode": "batch", "parallel": "fsdp"}
    train(inputs, run.name, 2, **UNEVEN | settings)
    (sharded,) = list_checkpoints(run)
    output = inputs / "unsharded"
    run_command(UnshardConfig, unshard, [str(run), "--output", str(output)])
    assert {path.name for path in output.iterdir()} == {
        "model.safetensors", "ema.safetensors", "model_config.json", "train_config.json", "tokenizer.json",
        "manifest.json", "step.json",
    }  # fmt: skip
    for weights in ("model", "ema"):
        ours, theirs = load_model(output, weights).state_dict(), load_model(sharded, weights).state_dict()
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
        assert "transformer.attention_layers.0.in_proj_qk.weight" in load_file(output / f"{weights}.safetensors")
    moved = [not torch.equal(tensor, load_model(output, "ema").state_dict()[name]) for name, tensor in ours.items()]
    assert not any(moved), "the last compared were the average's"
    assert not torch.equal(*(load_model(output, weights).head.dense.weight for weights in ("model", "ema")))
    for path, words in ((run, "is there already"), (inputs / "runs" / "one", "has no shards")):
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            run_command(UnshardConfig, unshard, [str(path), "--output", str(output if path == run else run / "new")])
        assert end.value.code == 1
        assert words in capfd.readouterr().err


def test_damaged_shards_are_named(inputs, one):
    run = inputs / "runs" / "damaged-shards"
    settings = {"config_file": inputs / "no_dropout.json", "max_steps": 2, "hybrid_mode": "batch", "parallel": "fsdp"}
    train(inputs, run.name, 2, **UNEVEN | settings)
    (path,) = list_checkpoints(run)
    config = ModelConfig.from_json(inputs / "no_dropout.json")
    file = sorted((path / "shards").iterdir())[1]
    content = file.read_bytes()
    for damage in (content[:-100], content[:50], b"", bytes(len(content))):
        file.write_bytes(damage)
        with pytest.raises(InputError, match=r"damaged \(shards/shard-00002-.*safetensors: "):
            load_model(path)
        manifest.write(path)  # make the manifest match the damage
        with pytest.raises(InputError, match=r"damaged .*shards: "):
            load_model(path)
        with pytest.raises(InputError, match="shards: "):
            whole(path, config)
    file.unlink()
    manifest.write(path)
    with pytest.raises(InputError, match=r"damaged .*shards: "):
        load_model(path)
    file.mkdir()  # as is a pipe, whose reading would never end
    with pytest.raises(InputError, match="shards: contains something that is not a file"):
        whole(path, config)


def on_rank(rank, check, arguments, results):
    """Target of `on_ranks`: run a check; its result is "right" or a traceback."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        check(World(rank, 2, CPU), arguments)
        results.put((rank, "right"))
    except Exception:  # noqa: BLE001  the test shows any exception
        results.put((rank, traceback.format_exc()))
    dist.barrier()
    dist.destroy_process_group()


def make_trainer(world, arguments):
    config = parse(TrainConfig, arguments)
    return Trainer(config, Inputs.open(config), HybridPlan(config, world.world_size), world)


def a_rank_holds_its_part(world, arguments):
    trainer = make_trainer(world, arguments)
    batch = trainer.loader.batch(trainer.loader.load(0), 0)
    params = list(trainer.model.parameters())
    with trainer.world.gradient_sync(trainer.training_step.parallel_model, is_on=False):
        trainer.training_step.forward(batch).total.backward()
    assert all(param.grad is None for param in params), "gradients wait for the last micro-batch"
    with trainer.world.gradient_sync(trainer.training_step.parallel_model, is_on=True):
        trainer.training_step.forward(batch).total.backward()
    trainer.optimizer.zero_grad()
    for step in range(2):
        norm = trainer.train_step(trainer.loader.load(step))
        assert not isinstance(norm, DTensor)
        trainer.validation_record()
    trainer.training_step.warm_up_evaluation(batch)
    total = trainer.inputs.model_config.num_parameters
    moments = [value for state in trainer.optimizer.state.values() for value in state.values() if value.ndim]
    for tensors, copies in ((params, 1), (list(trainer.ema.model.parameters()), 1), (moments, 2)):
        assert all(isinstance(tensor, DTensor) for tensor in tensors), "the whole weights are let go"
        assert sum(tensor.numel() for tensor in tensors) == copies * total
        here = sum(tensor.to_local().numel() for tensor in tensors)
        assert 0.45 * copies * total < here < 0.55 * copies * total


def a_checkpoint_is_taken_in_parts_and_whole_again(world, arguments):
    trainer = make_trainer(world, arguments)
    config = trainer.config
    checkpoint = load(list_checkpoints(config.run_dir)[-1], trainer.inputs.model_config)
    trainer.restore(checkpoint)
    for state, expected in (
        (trainer.model.state_dict(), checkpoint.model),
        (trainer.ema.model.state_dict(), checkpoint.ema),
        (trainer.optimizer.state_dict()["state"], checkpoint.optimizer["state"]),
    ):
        found = tree_map(lambda value: value.full_tensor() if isinstance(value, DTensor) else value, state)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def groups_wait_as_long_as_the_run_does(world, arguments):
    trainer = make_trainer(world, arguments)
    mesh = trainer.model.embedding.word_embedding.weight.device_mesh
    assert mesh.mesh_dim_names == ("replicate", "shard")
    assert mesh.mesh.tolist() == [[0], [1]]
    for name in mesh.mesh_dim_names:
        options = mesh.get_group(name)._get_backend(CPU).options
        assert options._timeout.total_seconds() == trainer.config.timeout


def everything_at_once_is_ddp(world, arguments):
    """In bf16 too: autocast casts whole weights, FSDP gathers cast ones. Without Inductor, which takes minutes."""
    compile_choice.COMPILE_SECONDS["cpu"] = 0
    nn.Module.compile = partialmethod(nn.Module.compile, backend="aot_eager")
    TrainingStep.warm_up_evaluation = lambda self, batch: None
    ddp = make_trainer(world, arguments)
    fsdp = make_trainer(world, [*arguments, "--parallel=fsdp", "--activation_checkpointing"])
    assert counters["stats"]["unique_graphs"] == 2 + 2, "weights in four bytes and in two"
    for step in range(3):
        norms = []
        for trainer in (ddp, fsdp):
            torch.manual_seed(step)  # for dropout
            norms.append(trainer.train_step(trainer.loader.load(step)))
        torch.testing.assert_close(norms[1], norms[0], rtol=1e-4, atol=0)
        torch.testing.assert_close(fsdp.sums.sums, ddp.sums.sums, rtol=1e-4, atol=0)
    assert counters["stats"]["unique_graphs"] == 2 + 2


@pytest.mark.parametrize(
    ("check", "settings"),
    [
        (a_rank_holds_its_part, {"parallel": "fsdp"}),
        (groups_wait_as_long_as_the_run_does, {"parallel": "fsdp", "shard_size": 1, "timeout": 77}),
        (a_checkpoint_is_taken_in_parts_and_whole_again, {"parallel": "fsdp", "name": "one", "resume": "auto"}),
        (everything_at_once_is_ddp, {"mixed_precision": True, "config_file": "model.json"}),
    ],
)
def test_two_sharded_ranks_do_what_the_check_says(inputs, one, check, settings):
    settings = UNEVEN | {"config_file": "no_dropout.json", "hybrid_mode": "batch"} | settings
    arguments = flags(inputs, **settings | {"config_file": inputs / settings["config_file"]})
    assert on_ranks(2, on_rank, check, arguments) == {0: "right", 1: "right"}


def steps_on_many_cores(rank, inputs, settings, results):
    """Number of micro-batches of a step, after another one; the second rank's host has 16 cores to a process."""
    if rank == 1:
        torch.get_num_threads = lambda: 16
    config = parse(TrainConfig, flags(inputs, **settings, no_compile=True, timeout=20))
    try:
        with connect(config) as world:
            trainer = Trainer(config, Inputs.open(config), HybridPlan(config, world.world_size), world)
            trainer.train_step(trainer.loader.load(0))
            batch = trainer.loader.batch(trainer.loader.load(1), 1)
            results.put((rank, len(trainer.micro_batches.cut(batch, 1))))
            del trainer  # before the process group is destroyed
    except LostProcessError as error:
        results.put((rank, str(error)))


@pytest.mark.parametrize("parallel", ["fsdp", "ddp"])
def test_hosts_may_have_different_numbers_of_cores(inputs, parallel):
    """Of two micro-batches, the second would wait for a rank that has one."""
    settings = {"hybrid_mode": "batch", "local_batch_size": 256, "global_batch_size": 256, "batch_reduction": 1}
    assert on_ranks(2, steps_on_many_cores, inputs, settings | {"parallel": parallel}) == {0: 2, 1: 2}


def test_most_micro_batches_is_a_bound_and_reached(make_config):
    for mode, ranks, rows in (("batch", 3, 2), ("rank", 4, 2), ("rank", 8, 1), ("batch", 5, 100)):
        config = make_config(hybrid_mode=mode, global_batch_size=61, batch_reduction=8, max_steps=50)
        plan, reached = HybridPlan(config, ranks), 0
        for step in range(config.max_steps):
            most = max(-(-sum(share.num_rows for share in plan.shares(step, rank)) // rows) for rank in range(ranks))
            assert max(1, most) <= plan.most_micro_batches(step, rows) <= most + 1
            reached += most == plan.most_micro_batches(step, rows)
        assert reached > 25


def test_ranks_must_divide_into_copies(inputs, make_config):
    for size, per_copy in ((0, 4), (1, 1), (2, 2), (4, 4)):
        assert shard_size(make_config(parallel="fsdp", shard_size=size), World(0, 4, CPU)) == per_copy
    with pytest.raises(InputError, match=r"^--shard_size 3 does not divide the 4 processes; these do: 1, 2, 4$"):
        shard_size(make_config(parallel="fsdp", shard_size=3), World(0, 4, CPU))
    with pytest.raises(InputError, match=r"^--shard_size 2 does not divide the 1 processes; these do: 1$"):
        fit(parse(TrainConfig, flags(inputs, name="odd", parallel="fsdp", shard_size=2)))
    assert not (inputs / "runs" / "odd").exists()
    with pytest.raises(InputError, match=r"^--shard_size 2 is for --parallel fsdp, not ddp$"):
        make_config(shard_size=2)


def test_one_process_has_nothing_to_shard(inputs):
    trainer = make_trainer(World(0, 1, CPU), flags(inputs, parallel="fsdp"))
    assert not any(isinstance(param, DTensor) for param in trainer.model.parameters())
    assert trainer.train_step(trainer.loader.load(0)) > 0
