"""Processes that differ in what must be the same: one line on each of them, before the first step."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from gptbert.command_line import parse
from gptbert.config import TrainConfig
from gptbert.data.hybrid_plan import HybridPlan
from gptbert.data.inputs import Inputs
from gptbert.distributed.agreement import check_same
from gptbert.distributed.fsdp import local
from gptbert.distributed.world import World, connect
from gptbert.errors import InputError, SharedError
from gptbert.model import GPTBert
from gptbert.train import train
from gptbert.trainer import Trainer
from tests.runs import MODEL, flags, on_ranks, write_inputs
from tokenize_scripts.tokenize_corpus import TokenizeConfig, tokenize_corpus

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


def _trained(rank, arguments, folders, variables, results):
    os.chdir(folders[rank])
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
    said = on_ranks(2, _trained, arguments, [inputs] * 2, variables)
    assert said[0] == said[1]
    assert said[0].startswith("the processes have chosen different kernels; name them with --kernels, or ")
    assert said[0].endswith("(unlike rank 0: rank 1)")
    assert not (inputs / "runs" / "kernels").exists()


def write_shape(folder):
    (folder / "model.json").write_text(json.dumps(MODEL | {"num_hidden_layers": 3}))


def write_tokens(folder):
    """A corpus of which a few lines were added since the other host got its copy."""
    lines = (folder / "valid.jsonl").read_text() * 2
    (folder / "more.jsonl").write_text(lines)
    files = {"input": (folder / "more.jsonl",), "tokenizer_path": folder / "tokenizer.json"}
    tokenize_corpus(TokenizeConfig(**files, output=folder / "more.safetensors"))


def replace_tokens(name):
    def replace(folder):
        write_tokens(folder)
        (folder / "more.safetensors").replace(folder / f"{name}.safetensors")

    return replace


def write_pairs(folder):
    (folder / "pairs.jsonl").write_text(json.dumps({"sentence_good": "Dogs bark.", "sentence_bad": "Dogs barks."}))


def write_run(folder):
    """Another run of the same name and shape."""
    shutil.rmtree(folder / "runs")
    (folder / "other").rename(folder / "runs")


@pytest.fixture(scope="module")
def host(inputs, tmp_path_factory):
    """What every host has: the inputs, pairs, and a checkpoint of a run of one step; and another run of that name."""
    (inputs / "pairs.jsonl").write_text(json.dumps({"sentence_good": "Cats sleep.", "sentence_bad": "Cats sleeps."}))
    for seed, folder in ((1, "runs"), (2, "other")):
        once = SHORT | {"max_steps": 1, "save_every": 1, "seed": seed, "output_dir": inputs / folder}
        train(parse(TrainConfig, flags(inputs, **once, name="before")))
    return inputs


STEP = "runs/before/checkpoints/step_00000001"
WORDS = "differs between hosts; each needs the same file (unlike rank 0: rank 1)"


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (None, {}, ""),
        (None, {"parallel": "fsdp", "pairs_path": "pairs.jsonl", "initial_weights": STEP}, ""),
        (write_shape, {}, "--config_file model.json: its content"),
        (write_shape, {"parallel": "fsdp"}, "--config_file model.json: its content"),
        (write_inputs, {}, "--tokenizer_path tokenizer.json: its content"),
        (write_pairs, {"pairs_path": "pairs.jsonl"}, "--pairs_path: its content"),
        (replace_tokens("train"), {}, "--train_path train.safetensors: its content"),
        (replace_tokens("train"), {"parallel": "fsdp"}, "--train_path train.safetensors: its content"),
        (replace_tokens("valid"), {}, "--valid_path valid.safetensors: its content"),
        (write_run, {"initial_weights": STEP}, f"--initial_weights {STEP}: its content"),
        (write_run, {"resume": STEP}, f"--resume {STEP}: its content"),
    ],
)
def test_hosts_with_other_files_of_the_same_names_are_refused(host, tmp_path, change, settings, message):
    """Copies on each host's own disk do; none of these would end by itself, but for the shape, with a crash."""
    folders = [shutil.copytree(host, tmp_path / name) for name in ("first", "second")]
    if change:
        change(folders[1])
    arguments = flags(Path(), **SHORT | settings, name="differ", output_dir=tmp_path / "shared")
    said = on_ranks(2, _trained, arguments, folders, [{}, {}])
    assert said[0] == said[1] == (message and f"{message} {WORDS}")
    assert (tmp_path / "shared" / "differ" / "metrics.jsonl").exists() is not bool(message)


def _first_weights(rank, arguments, results):
    """This rank's weights and their average before the first step, where it has drawn numbers of its own."""
    draw = GPTBert.__init__

    def drawn(model, config):
        draw(model, config)
        for param in model.parameters():
            param.data += rank

    GPTBert.__init__ = drawn
    config = parse(TrainConfig, arguments)
    with connect(config) as world:
        trainer = Trainer(config, Inputs.open(config), HybridPlan(config, world.world_size), world)
        models = (trainer.model, trainer.ema.model)
        results.put((rank, [local(param).tolist() for model in models for param in model.parameters()]))
        del trainer, models  # before the process group is destroyed


@pytest.mark.parametrize(
    "settings",
    [{"cuda_graph": "on"}, {"cuda_graph": "off"}, {"parallel": "fsdp", "shard_size": 1}],
    ids=["recorded", "ddp", "copies of shards"],
)
def test_all_ranks_begin_with_the_main_ranks_weights(inputs, settings):
    """CPUs of two kinds draw weights that differ by 2e-7, and nothing would ever bring them together."""
    said = on_ranks(2, _first_weights, flags(inputs, **SHORT, **settings))
    assert len(said[0]) > 40
    assert said[0] == said[1]
    assert said[0][: len(said[0]) // 2] == said[0][len(said[0]) // 2 :], "the average is of the same"
