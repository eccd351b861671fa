"""Importing published weights, and a run that starts from them."""

import collections
import json
import re
import shutil
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptbert.checkpoint import manifest
from gptbert.checkpoint.folder import list_checkpoints
from gptbert.checkpoint.initial_weights import read_initial_weights
from gptbert.checkpoint.saved_model import load_model
from gptbert.command_line import parse, run_command
from gptbert.config import TrainConfig
from gptbert.errors import InputError
from gptbert.export import ExportConfig, export
from gptbert.import_hf import ImportConfig, import_hf
from gptbert.text.tokenizer import tokenizer_hash
from gptbert.upstream import to_upstream
from tests.exported import SHAPE, random_model, write_checkpoint
from tests.runs import Ranks, flags
from tests.tokenizer_kinds import kinds


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, its export, and files in upstream's format."""
    folder = tmp_path_factory.mktemp("import")
    checkpoint, _ = write_checkpoint(folder)
    export(ExportConfig(checkpoint, folder / "exported"))
    (folder / "config.json").write_text(json.dumps(asdict(SHAPE)))
    published = {name: to_upstream(random_model(seed).state_dict(), SHAPE) for name, seed in (("model", 1), ("ema", 2))}
    bin_file = collections.OrderedDict(published["model"])
    bin_file._metadata = {"": {"version": 1}}  # as in a module's state_dict
    torch.save(bin_file, folder / "upstream.bin")
    state = {
        "model": {f"module.{name}": tensor for name, tensor in published["model"].items()},
        "ema_model": collections.OrderedDict(published["ema"]),
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]},
        "global_step": 7,
    }
    torch.save(state, folder / "upstream_state_dict.bin")
    hub = folder / "hub"  # as published: extra keys, a different head, and no safetensors
    hub.mkdir()
    (hub / "config.json").write_text(json.dumps(asdict(SHAPE) | {"temperature": 2.65, "architectures": ["X"]}))
    torch.save(published["model"] | {"head.nonlinearity.1.weight": torch.ones(2)}, hub / "pytorch_model.bin")
    shutil.copyfile(checkpoint / "tokenizer.json", hub / "tokenizer.json")
    shutil.copyfile(checkpoint / "tokenizer.json", folder / "tokenizer.json")
    return folder


def assert_holds(output, seed, weights):
    expected = random_model(seed).state_dict()
    found = load_model(output, weights).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("source", "model_seed", "ema_seed"),
    [("exported", 2, 2), ("hub", 1, 1), ("upstream.bin", 1, 1), ("upstream_state_dict.bin", 1, 2)],
)
def test_weights_come_back_to_the_bit(folder, tmp_path, capsys, source, model_seed, ema_seed):
    import_hf(ImportConfig(folder / source, tmp_path / "out"))
    assert_holds(tmp_path / "out", model_seed, "model")
    assert_holds(tmp_path / "out", ema_seed, "ema")
    assert ("without head.nonlinearity.1.weight" in capsys.readouterr().out) == (source == "hub")


def test_half_precision_becomes_fp32(folder, tmp_path):
    weights = {name: tensor.bfloat16() for name, tensor in load_file(folder / "exported/model.safetensors").items()}
    save_file(weights, tmp_path / "half.safetensors")
    settings = {"config_file": folder / "config.json", "tokenizer_path": folder / "tokenizer.json"}
    import_hf(ImportConfig(tmp_path / "half.safetensors", tmp_path / "out", **settings))
    assert {tensor.dtype for tensor in load_model(tmp_path / "out").state_dict().values()} == {torch.float32}


def test_refusals_name_what_is_wrong_and_leave_nothing(folder, tmp_path):
    settings = {"config_file": folder / "config.json", "tokenizer_path": folder / "tokenizer.json"}
    weights = load_file(folder / "exported/model.safetensors")
    bias = "classifier.nonlinearity.5.bias"
    files = {
        "missing": {name: weights[name] for name in weights if name != bias},
        "headless": {name: weights[name] for name in weights if not name.startswith("classifier.")},
        "unknown": weights | {"transformer.more": torch.ones(2)},
        "shape": weights | {bias: torch.ones(3)},
        "integers": weights | {bias: weights[bias].long()},
    }
    for name, content in files.items():
        save_file(content, tmp_path / f"{name}.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((folder / "exported/model.safetensors").read_bytes()[:900])
    torch.save([torch.ones(2)], tmp_path / "list.bin")
    torch.save({"a": 1}, tmp_path / "numbers.bin")
    (folder / "inputs" / "empty").mkdir()
    before = sorted(tmp_path.iterdir())
    for source, message in (
        ("missing.safetensors", r"head.bias is missing \(in files: classifier.nonlinearity.5.bias\) \(shape by"),
        ("headless.safetensors", r"5.bias\); it was saved for another task, without its language model's head"),
        ("unknown.safetensors", "transformer.more is no parameter of a GPT-BERT"),
        ("shape.safetensors", r"head.bias does not fit the model: \[3\] for \[324\]"),
        ("integers.safetensors", "head.bias is of type int64, expected floats"),
        ("cut.safetensors", "cut.safetensors: "),
        ("list.bin", "list.bin: expected a dictionary of weights"),
        ("numbers.bin", r"numbers.bin: holds no weights of a GPT-BERT \(it has 'a'\)"),
        ("nothing.bin", "no such file or folder"),
    ):
        with pytest.raises(InputError, match=message):
            import_hf(ImportConfig(tmp_path / source, tmp_path / "out", **settings))
    for source, changes, message in (
        (folder / "exported", {"config_file": tmp_path / "no.json"}, r"no.json: no such file; .* with --config_file"),
        (tmp_path / "missing.safetensors", {}, r"config.json: no such file; .* with --config_file"),
        (folder / "checkpoint", {}, "of this trainer: --initial_weights takes it as it is"),
        (folder, {}, r"several files that may be the weights \(upstream.bin, upstream_state_dict.bin\)"),
        (folder / "inputs" / "empty", {}, "holds neither model.safetensors nor pytorch_model.bin"),
    ):
        with pytest.raises(InputError, match=message):
            import_hf(ImportConfig(source, tmp_path / "out", **changes))
    with pytest.raises(InputError, match=r"OUTPUT .* is there already"):
        import_hf(ImportConfig(folder / "exported", tmp_path / "list.bin"))
    assert sorted(tmp_path.iterdir()) == before


def test_the_command_ends_with_one_line(folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        run_command(ImportConfig, import_hf, [str(tmp_path), str(tmp_path / "out")])
    assert end.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1


def run_to_the_end(arguments, folder, status):
    """What a run prints that ends with this status."""
    output, ended = Ranks(arguments, 1, folder / "run.log").communicate()
    assert ended == status, output
    return output


def test_a_run_starts_from_the_weights(folder, tmp_path):
    """At learning rate 0 the weights are unchanged at the end; a run with a checkpoint resumes from that instead."""
    inputs = folder / "inputs"
    import_hf(ImportConfig(folder / "exported", tmp_path / "imported"))
    settings = {"config_file": folder / "config.json", "output_dir": tmp_path, "log_every": 1, "max_steps": 2}
    settings |= {"initial_weights": tmp_path / "imported", "learning_rate": 0}
    output = run_to_the_end(flags(inputs, name="still", **settings), tmp_path, 0)
    assert f"starting from the weights of {tmp_path / 'imported'}" in output
    for weights in ("model", "ema"):
        assert_holds(list_checkpoints(tmp_path / "still")[-1], 2, weights)
    settings |= {"max_steps": 3, "learning_rate": 1e-2, "resume": "auto", "initial_weights": tmp_path / "gone"}
    output = run_to_the_end(flags(inputs, name="still", **settings), tmp_path, 0)
    assert "going on from" in output


def test_an_exported_tokenizer_is_the_runs(folder, tmp_path):
    """Weights come back with a normalized tokenizer; the run goes on with the original one and its token files."""
    checkpoint = shutil.copytree(folder / "checkpoint", tmp_path / "checkpoint")
    (checkpoint / "tokenizer.json").write_text(kinds()["special tokens that strip"])
    manifest.write(checkpoint)
    export(ExportConfig(checkpoint, tmp_path / "exported"))
    import_hf(ImportConfig(tmp_path / "exported", tmp_path / "imported"))
    own, back = (path / "tokenizer.json" for path in (checkpoint, tmp_path / "imported"))
    assert tokenizer_hash(own) != tokenizer_hash(back)
    for tokenizer_path in (own, back):
        arguments = flags(folder, initial_weights=tmp_path / "imported", tokenizer_path=tokenizer_path)
        assert read_initial_weights(parse(TrainConfig, arguments), SHAPE)
    arguments = flags(folder, initial_weights=tmp_path / "imported", tokenizer_path=folder / "tokenizer.json")
    config = parse(TrainConfig, arguments)
    with pytest.raises(InputError, match=r"imported: its tokenizer.json is not --tokenizer_path"):
        read_initial_weights(config, SHAPE)


def test_initial_weights_that_do_not_fit_are_refused(folder, tmp_path):
    inputs = folder / "inputs"
    for changes, message in (
        ({"initial_weights": folder / "hub"}, "--initial_weights: .*neither a checkpoint nor a run"),
        ({"resume": folder / "checkpoint"}, "--resume .*: holds weights and no run .* --initial_weights starts one"),
        ({"initial_weights": folder / "checkpoint"}, "differs from --config_file: num_hidden_layers 3 there, 2 here"),
    ):
        output = run_to_the_end(flags(inputs, name="refused", output_dir=tmp_path / "runs", **changes), tmp_path, 1)
        (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
        assert re.search(message, line), line
    assert not (tmp_path / "runs").exists()
