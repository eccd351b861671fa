"""Bad input ends a run with one clear line, a non-zero status, no traceback, and no files written."""

import dataclasses
import errno
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from gptbert.command_line import run_command
from gptbert.config import TrainConfig
from gptbert.data.token_store import TokenStoreWriter
from gptbert.distributed.world import World, connect
from gptbert.errors import InputError
from gptbert.text.tokenizer import tokenizer_hash
from gptbert.train import fit
from gptbert.training.preparation import prepare_run_dir
from tests.runs import MODEL, flags, on_ranks, write_inputs


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"), train_characters=10_000)


@pytest.fixture
def inputs(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "inputs")


def run(arguments):
    run_command(TrainConfig, fit, arguments)


def truncate(path, share):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


def bad_model(inputs, **changes):
    path = inputs / "bad.json"
    path.write_text(json.dumps({key: value for key, value in (MODEL | changes).items() if value is not None}))
    return path


def foreign_tokens(inputs, vocab_size=320, digest="0" * 64):
    with TokenStoreWriter(inputs / "foreign.safetensors", vocab_size, digest) as writer:
        writer.append(np.full(5000, vocab_size - 1), np.array([5000]))
    return inputs / "foreign.safetensors"


def own_tokens(inputs, vocab_size):
    return foreign_tokens(inputs, vocab_size, tokenizer_hash(inputs / "tokenizer.json"))


def damaged_tokens(inputs):
    """A token file whose last token id is not below its own vocabulary size."""
    content = bytearray((inputs / "valid.safetensors").read_bytes())
    with safe_open(inputs / "valid.safetensors", "np") as file:
        tokens = file.get_tensor("tokens")
    content[content.index(tokens.tobytes()) + 2 * len(tokens) - 1] |= 0x02  # + 512
    return write(inputs / "damaged.safetensors", bytes(content))


def write(path, content):
    path.write_bytes(content)
    return path


CASES = {
    "missing token file": (lambda i: {"train_path": i / "gone.safetensors"}, ["--train_path", "no such file"]),
    "empty token file": (lambda i: {"valid_path": write(i / "e.safetensors", b"")}, ["--valid_path", "empty"]),
    "truncated token file": (
        lambda i: {"train_path": truncate(i / "train.safetensors", 0.7)},
        ["train.safetensors", "cut short"],
    ),
    "truncated header": (lambda i: {"train_path": truncate(i / "train.safetensors", 0.005)}, ["train.safetensors"]),
    "token file of another kind": (lambda i: {"train_path": i / "train.jsonl"}, ["train.jsonl"]),
    "token file is a folder": (lambda i: {"train_path": i}, ["--train_path", "folder"]),
    "one of two token files is missing": (
        lambda i: {"train_path": [i / "train.safetensors", i / "gone.safetensors"]},
        ["--train_path", "gone.safetensors", "no such file"],
    ),
    "one of two has another tokenizer": (
        lambda i: {"train_path": [i / "train.safetensors", foreign_tokens(i)]},
        ["--train_path", "foreign.safetensors", "another tokenizer"],
    ),
    "weights for other files": (lambda i: {"train_weights": [1, 2]}, ["--train_weights", "2 for 1 of --train_path"]),
    "weights are no numbers": (lambda i: {"train_weights": ["much"]}, ["--train_weights", "much"]),
    "wrong tokenizer": (lambda i: {"train_path": foreign_tokens(i)}, ["--train_path", "another tokenizer"]),
    "tokenizer missing": (lambda i: {"tokenizer_path": i / "gone.json"}, ["gone.json", "no such file"]),
    "tokenizer is something else": (lambda i: {"tokenizer_path": i / "model.json"}, ["model.json", "tokenizer"]),
    "another number of special tokens": (
        lambda i: {"n_special_tokens": 5},
        ["--n_special_tokens 5", "tokenizer.json has 16 special tokens"],
    ),
    "token ids above the tokenizer's": (
        lambda i: {"train_path": own_tokens(i, 400)},
        ["--train_path", "399", "vocab_size 320", "--tokenizer_path"],
    ),
    "token ids above the file's own": (
        lambda i: {"valid_path": damaged_tokens(i)},
        ["--valid_path", "token id 5"],
    ),
    "key given twice": (
        lambda i: {"config_file": write(i / "twice.json", b'{"hidden_size": 32, "hidden_size": 64}')},
        ["--config_file", "hidden_size is given twice"],
    ),
    "config of absurd size": (
        lambda i: {"config_file": bad_model(i, hidden_size=10**12)},
        ["--config_file", "hidden_size is 1000000000000"],
    ),
    "name too long": (lambda i: {"name": "n" * 300}, ["--name has 300 bytes"]),
    "path too long": (lambda i: {"train_path": "n" * 300}, ["nnn", "too long"]),
    "infinite weight decay": (lambda i: {"weight_decay": "inf"}, ["--weight_decay is inf"]),
    "unknown config key": (lambda i: {"config_file": bad_model(i, hidden_sise=3)}, ["hidden_sise", "bad.json"]),
    "missing config key": (lambda i: {"config_file": bad_model(i, hidden_size=None)}, ["hidden_size", "bad.json"]),
    "config is not JSON": (lambda i: {"config_file": i / "train.safetensors"}, ["train.safetensors", "JSON"]),
    "ratio above 1": (lambda i: {"hybrid_numerator": 5}, ["--hybrid_numerator 5", "--hybrid_denominator 4"]),
    "sequence longer than the corpus": (lambda i: {"seq_length": 50_000}, ["tokens", "50000", "--seq_length"]),
    "batch too small for both": (
        lambda i: {"global_batch_size": 1, "batch_reduction": 1},
        ["--global_batch_size 1", "two"],
    ),
    "unwritable output": (lambda i: {"output_dir": i / "model.json" / "runs"}, ["--output_dir", "cannot be written"]),
    "resume from no checkpoint": (lambda i: {"resume": i}, ["--resume", "not a checkpoint"]),
    "resume from nowhere": (lambda i: {"resume": i / "gone"}, ["--resume", "gone", "not a checkpoint"]),
    "unknown optimizer": (lambda i: {"optimizer": "sgd"}, ["sgd", "--optimizer", "lamb"]),
    "unknown flag": (lambda i: {"learning_rat": 1}, ["--learning_rat"]),
    "not a number": (lambda i: {"max_steps": "many"}, ["--max_steps", "many"]),
    "run folder outside": (lambda i: {"name": "../elsewhere"}, ["--name", "output_dir"]),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_to_a_run_is_one_line_that_names_it(case, inputs, capfd):
    change, expected = CASES[case]
    before = set(inputs.rglob("*"))
    arguments = flags(inputs, **change(inputs))
    after_setup = set(inputs.rglob("*"))
    with pytest.raises(SystemExit) as end:
        run(arguments)
    output = capfd.readouterr()
    assert end.value.code in {1, 2}
    assert output.out == ""
    assert len(output.err.splitlines()) == 1, output.err
    assert output.err.startswith("error: ")
    for text in expected:
        assert text in output.err
    assert before <= after_setup == set(inputs.rglob("*")), "nothing is written"


@pytest.fixture(scope="module")
def finished(pristine):
    run(flags(pristine, name="finished", max_steps=2, save_every=1))
    return pristine


def test_a_second_run_under_the_same_name_is_refused(finished, capfd):
    files = {path: path.stat().st_mtime_ns for path in (finished / "runs").rglob("*") if path.is_file()}
    with pytest.raises(SystemExit):
        run(flags(finished, name="finished", max_steps=2))
    assert "--resume auto" in capfd.readouterr().err
    assert files == {path: path.stat().st_mtime_ns for path in (finished / "runs").rglob("*") if path.is_file()}


def test_resume_with_another_model_names_the_difference(finished, capfd):
    config = bad_model(finished, hidden_size=64)
    with pytest.raises(SystemExit):
        run(flags(finished, name="finished", resume="auto", config_file=config, max_steps=4))
    error = capfd.readouterr().err
    assert "hidden_size 32 there, 64 here" in error
    assert len(error.splitlines()) == 1


def test_resume_with_another_tokenizer_is_refused(finished, tmp_path, capfd):
    other = write_inputs(tmp_path, train_characters=20_000)
    with pytest.raises(SystemExit):
        run(flags(other, name="other", resume=finished / "runs/finished", max_steps=4))
    assert "is not the tokenizer" in capfd.readouterr().err


def test_resume_from_an_older_checkpoint_needs_another_name(finished, capfd):
    older = finished / "runs/finished/checkpoints/step_00000001"
    with pytest.raises(SystemExit):
        run(flags(finished, name="finished", resume=older, max_steps=4))
    assert "step_00000002" in capfd.readouterr().err
    run(flags(finished, name="branch", resume=older, max_steps=2))
    assert (finished / "runs/branch/checkpoints/step_00000002").is_dir()
    own_tokenizer = finished / "runs/branch/tokenizer.json"
    run(flags(finished, name="branch", resume="auto", tokenizer_path=own_tokenizer, max_steps=3))
    assert (finished / "runs/branch/checkpoints/step_00000003").is_dir()


def test_resume_of_a_finished_run_says_so(finished, capfd):
    records = (finished / "runs/finished/metrics.jsonl").read_text()
    run(flags(finished, name="finished", resume="auto", max_steps=2))  # a batch system may start a finished run again
    assert "finished already" in capfd.readouterr().err
    assert (finished / "runs/finished/metrics.jsonl").read_text() == records
    with pytest.raises(SystemExit):
        run(flags(finished, name="other", resume=finished / "runs/finished", max_steps=2))
    assert "--max_steps 2" in capfd.readouterr().err


def test_resume_with_another_optimizer_is_refused(finished, capfd):
    with pytest.raises(SystemExit):
        run(flags(finished, name="finished", resume="auto", optimizer="adamw", max_steps=4))
    assert "--optimizer adamw" in capfd.readouterr().err


def test_masks_counted_in_other_files_are_refused(pristine, capfd):
    run(flags(pristine, name="counted", max_steps=1, mask_history=True))
    files = {file: file.stat().st_mtime_ns for file in (pristine / "runs/counted").rglob("*")}
    more = {"train_path": [pristine / "train.safetensors", pristine / "valid.safetensors"]}
    with pytest.raises(SystemExit):
        run(flags(pristine, name="counted", max_steps=2, resume="auto", mask_history=True, **more))
    assert "error: --mask_history: the checkpoint counts masks" in capfd.readouterr().err.splitlines()[-1]
    assert files == {file: file.stat().st_mtime_ns for file in (pristine / "runs/counted").rglob("*")}
    run(flags(pristine, name="counted", max_steps=2, resume="auto", **more))
    said = capfd.readouterr().err
    train, valid = more["train_path"]
    assert f"changed since: --train_path {train} -> {train} {valid}, " in said
    assert re.search(r"training on [67]\d(\.\d)? % train \(\d,\d{3} tokens, ", said)


@pytest.mark.parametrize("words", [[], ["100"]])
def test_a_run_that_diverges_says_so_and_saves_nothing(finished, capfd, words):
    settings = {"learning_rate": 1e30, "max_steps": 8, "warmup_proportion": 0, "checkpoint_words": words}
    with pytest.raises(SystemExit) as end:
        run(flags(finished, name="diverged", **settings))
    assert end.value.code == 1
    assert "diverged" in capfd.readouterr().err.splitlines()[-1]
    assert not list((finished / "runs/diverged").rglob("*.safetensors"))


@pytest.mark.parametrize("file", ["model.safetensors", "training_state.pt", "model_config.json"])
def test_resume_from_a_damaged_checkpoint(finished, tmp_path, capfd, file):
    damaged = shutil.copytree(finished / "runs/finished/checkpoints/step_00000001", tmp_path / "damaged")
    truncate(damaged / file, 0.5)
    with pytest.raises(SystemExit):
        run(flags(finished, name="other", resume=damaged, max_steps=4))
    error = capfd.readouterr().err
    assert "damaged" in error or "cannot be read" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("name", ["config.json", "run.yaml", "tokenizer.json"])
def test_a_full_disk_at_a_start_costs_none_of_the_files_that_were_there(tmp_path, make_config, tiny, monkeypatch, name):
    (tmp_path / "tokenizer.json").write_text("{}")
    config = make_config(output_dir=tmp_path, name="run", tokenizer_path=tmp_path / "tokenizer.json")
    world = World(0, 1, torch.device("cpu"))
    prepare_run_dir(config, tiny, world, "torch")
    before = {path.name: path.read_text() for path in config.run_dir.iterdir()}
    assert name in before

    def half(file, *_, **__):
        Path(file).write_bytes(b"{")
        raise OSError(errno.ENOSPC, "No space left on device")

    if name == "tokenizer.json":
        monkeypatch.setattr("shutil.copyfile", lambda _, file: half(file))
    else:
        write = Path.write_text
        monkeypatch.setattr(
            Path, "write_text", lambda file, *text, **how: (half if name in file.name else write)(file, *text, **how)
        )
    with pytest.raises(InputError, match=r"cannot be written \(No space left on device\)"):
        prepare_run_dir(dataclasses.replace(config, seed=1), tiny, world, "torch")
    now = {path.name: path.read_text() for path in config.run_dir.iterdir()}
    assert (now.keys(), now[name]) == (before.keys(), before[name])


def complain(only_if):
    if only_if:
        raise InputError("only the second rank sees this")


def fail_on_one_rank(rank, path, results):
    config = TrainConfig((path,), path, path, path, device="cpu", timeout=60)
    with connect(config) as world:
        try:
            with world.errors_on_all_ranks():
                complain(only_if=world.rank == 1)
        except InputError as error:
            results.put((rank, str(error)))


def test_a_mistake_on_one_rank_ends_all_of_them(tmp_path):
    said = on_ranks(2, fail_on_one_rank, tmp_path)
    assert sorted(said.items()) == [(rank, "only the second rank sees this") for rank in range(2)]


def test_wandb_online_without_a_login_is_one_line(inputs, monkeypatch, capfd):
    monkeypatch.setenv("HOME", str(inputs))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(SystemExit):
        run(flags(inputs, wandb_mode="online"))
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "--wandb_mode offline" in lines[0]
