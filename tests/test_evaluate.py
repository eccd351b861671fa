"""Evaluation after a run: the run's own logged values, text and token files, and domains."""

import dataclasses
import json
import math
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from gptbert.checkpoint import manifest
from gptbert.checkpoint.folder import list_checkpoints
from gptbert.command_line import parse, run_command
from gptbert.config import TrainConfig
from gptbert.data.token_store import TokenStore, TokenStoreWriter
from gptbert.distributed.hardware import has_bf16
from gptbert.errors import InputError
from gptbert.evaluate import EvaluateSettings, encode_domains, evaluate, evaluate_store, is_token_file
from gptbert.export import ExportConfig, export
from gptbert.io.outputs import check_outputs
from gptbert.model.objective import Objective
from gptbert.monitoring.records import read_records
from gptbert.monitoring.validation import ValidationSettings
from gptbert.scoring.trained_model import ModelChoice, TrainedModel
from gptbert.text.corpus import CorpusConfig
from gptbert.text.special_tokens import BOS_ID
from gptbert.text.tokenizer import tokenizer_hash
from gptbert.train import fit
from tests.runs import flags, write_inputs

METRICS = ("loss", "perplexity", "accuracy")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("evaluate"), train_characters=10_000)


@pytest.fixture(scope="module")
def run_dir(inputs):
    """A run with non-default validation settings."""
    settings = {"validation_mask_p": 0.4, "mask_keep_p": 0.3, "mask_random_p": 0.2, "seq_length": 24}
    fit(parse(TrainConfig, flags(inputs, name="run", max_steps=6, ema_decay=0.5, mixed_precision=True, **settings)))
    return inputs / "runs/run"


@pytest.fixture(scope="module")
def trained(run_dir):
    return TrainedModel.load(ModelChoice(run=run_dir))


def results(run_dir, tmp_path, *data, **settings):
    output = tmp_path / "results.json"
    evaluate(EvaluateSettings(run=run_dir, input=data, output=output, **settings))
    return json.loads(output.read_text())


@pytest.mark.parametrize(("weights", "prefix"), [("model", "validation"), ("ema", "validation_ema")])
def test_a_checkpoint_gives_what_its_run_logged(inputs, run_dir, tmp_path, weights, prefix):
    found = results(run_dir, tmp_path, inputs / "valid.safetensors", weights=weights, validation_steps=2)["all"]
    logged = [record for record in read_records(run_dir / "metrics.jsonl") if f"{prefix}/mlm/loss" in record][-1]
    for objective in Objective:
        for metric in METRICS:
            value = found[objective.value][metric]
            assert value == pytest.approx(logged[f"{prefix}/{objective.value}/{metric}"], rel=1e-6), metric


def test_all_rows_are_evaluated_unless_asked_otherwise(inputs, run_dir, tmp_path, capsys):
    every = results(run_dir, tmp_path, inputs / "valid.safetensors")["all"]
    assert every["num_tokens"] == every["clm"]["count"], "each token is predicted once"
    assert "--validation_steps 2" in capsys.readouterr().out
    some = results(run_dir, tmp_path, inputs / "valid.safetensors", validation_steps=2)["all"]
    assert some["clm"]["count"] < every["clm"]["count"]
    assert "--validation_steps" not in capsys.readouterr().out


@pytest.mark.parametrize(("is_mixed", "is_fast"), [(True, True), (True, False), (False, True), (False, False)])
def test_precision_is_the_runs_where_bf16_is_fast(inputs, trained, monkeypatch, is_mixed, is_fast):
    monkeypatch.setattr("gptbert.evaluate.has_bf16", lambda _: is_fast)
    settings = dataclasses.replace(ValidationSettings.from_json(trained.path), mixed_precision=is_mixed)
    seen = set()
    hook = trained.model.register_forward_pre_hook(lambda *_: seen.add(torch.is_autocast_enabled("cpu")))
    evaluate_store(trained, TokenStore.open(inputs / "valid.safetensors"), settings)
    hook.remove()
    assert seen == {is_mixed and is_fast}


def test_data_that_the_run_was_trained_on_are_told(inputs, run_dir, tmp_path, capsys):
    """By name, by content under another name, and as the texts of which the token file was made."""
    shutil.copy(inputs / "train.safetensors", tmp_path / "another.safetensors")
    trained_on = (inputs / "train.safetensors", tmp_path / "another.safetensors", inputs / "train.jsonl")
    others = (inputs / "valid.safetensors", inputs / "valid.jsonl")
    for file in (*trained_on, *others):
        results(run_dir, tmp_path, file, validation_steps=1)
        assert ("is what the run was trained on (--train_path)" in capsys.readouterr().out) == (file in trained_on)


def test_without_a_training_state_data_are_known_by_their_name(inputs, run_dir, tmp_path, capsys):
    copy = shutil.copytree(list_checkpoints(run_dir)[-1], tmp_path / "checkpoint")
    (copy / "training_state.pt").unlink()
    manifest.write(copy)
    for name in (inputs / "train.safetensors", os.path.relpath(inputs / "train.safetensors")):
        results(copy, tmp_path, Path(name), validation_steps=1)
        assert "is what the run was trained on" in capsys.readouterr().out


def test_texts_are_what_a_token_file_of_them_is(inputs, run_dir, tmp_path):
    token_file = results(run_dir, tmp_path, inputs / "valid.safetensors")
    assert results(run_dir, tmp_path, inputs / "valid.jsonl")["all"] == token_file["all"]
    (tmp_path / "hub").mkdir()
    lines = [json.loads(line) for line in (inputs / "valid.jsonl").open()]
    (tmp_path / "hub" / "valid.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    output = tmp_path / "by-name.json"
    run_command(EvaluateSettings, evaluate, [str(run_dir), "--dataset", str(tmp_path / "hub"), "--output", str(output)])
    assert json.loads(output.read_text())["all"] == token_file["all"]


def test_settings_of_the_command_line(inputs, run_dir, tmp_path):
    data = inputs / "valid.safetensors"
    masked = [results(run_dir, tmp_path, data, mask_p=share)["all"] for share in (0.1, 0.8)]
    assert 6 < masked[1]["mlm"]["count"] / masked[0]["mlm"]["count"] < 10
    assert masked[0]["clm"] == masked[1]["clm"]
    longer = results(run_dir, tmp_path, data, seq_length=60)
    assert longer["seq_length"] == 60
    assert longer["all"]["clm"]["count"] == masked[0]["clm"]["count"]
    assert longer["all"]["clm"]["loss"] != masked[0]["clm"]["loss"]


def test_domains_are_evaluated_apart_and_together(run_dir, trained, tmp_path, capsys):
    """The tiny domain has fewer tokens than a row."""
    texts = {
        "news": ["The first statement. " * 9, "It returns a value."],
        "all": ["The name of a file " * 12],
        "3": ["a"],
    }
    order = ["news", "all", "news", "3"]
    left = {domain: list(documents) for domain, documents in texts.items()}
    lines = [{"text": left[domain].pop(0), "genre": 3 if domain == "3" else domain} for domain in order]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = results(run_dir, tmp_path, tmp_path / "a.jsonl", domain_field="genre")
    assert list(found["domains"]) == ["news", "all", "3"]
    for domain, documents in texts.items():
        (tmp_path / "alone.jsonl").write_text("".join(json.dumps(text) + "\n" for text in documents))
        assert found["domains"][domain] == results(run_dir, tmp_path, tmp_path / "alone.jsonl")["all"]
    for objective in ("mlm", "clm"):
        each = [domain[objective] for domain in found["domains"].values()]
        count = sum(values["count"] for values in each)
        loss = sum(values["loss"] * values["count"] for values in each) / count
        together = found["all"][objective]
        assert (together["count"], together["loss"]) == (count, pytest.approx(loss))
        assert together["perplexity"] == pytest.approx(math.exp(loss))
    assert found["all"]["num_documents"] == 4
    assert "genre" in capsys.readouterr().out
    # the tiny domain, computed directly
    ids = torch.tensor([[BOS_ID]])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=has_bf16(trained.device)):
        logits = trained.model.logits(trained.model.encode(ids, torch.zeros_like(ids), causal=True))
    expected = -logits[0, 0].float().log_softmax(-1)[trained.tokenizer.token_to_id("a")].item()
    assert found["domains"]["3"]["clm"]["loss"] == pytest.approx(expected, rel=1e-4)
    assert found["domains"]["3"]["clm"]["count"] == found["domains"]["3"]["mlm"]["count"] == 1


def test_domains_keep_every_token_in_order(trained, tmp_path):
    documents = [("a", "one two"), ("b", "three"), ("a", "four"), ("b", "five six seven")]
    lines = [json.dumps({"text": text, "domain": domain}) + "\n" for domain, text in documents]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    stores = encode_domains(trained, CorpusConfig(input=(tmp_path / "a.jsonl",)), "domain")
    for domain, store in stores.items():
        starts, lengths = store.documents()
        tokens, _ = store.gather(starts, lengths)
        assert trained.tokenizer.decode(tokens.tolist()) == "".join(text for name, text in documents if name == domain)
        assert len(lengths) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}/gone.jsonl"], "gone.jsonl: no such file or folder"),
        (["{}/gone.safetensors"], "gone.safetensors: no such file"),
        ([], "DATA: needs a token file, or at least one file or folder of documents, or --dataset a name"),
        (["{}/a.jsonl", "--dataset", "x"], "DATA and --dataset: give one of the two"),
        (["{}/b.safetensors", "--dataset", "x"], "DATA and --dataset: give one of the two"),
        (["{}/a.jsonl", "--dataset_config", "en"], "--dataset_config en: is of --dataset, which was not given"),
        (["{}/a.jsonl", "--split", "dev"], "--split dev: chooses in a folder"),
        (["{}/a.jsonl", "{}/b.safetensors"], "a token file is evaluated on its own"),
        (["{}/b.safetensors", "--domain_field", "x"], "--domain_field x: the token file"),
        (
            ["{}/a.jsonl", "--domain_field", "x"],
            "the object has no `x`, only `text`; give another field as --domain_field",
        ),
        (
            ["{}/g.jsonl", "--domain_field", "x"],
            "g.jsonl:2: the object has no `x`, only `text`; correct it, or leave such",
        ),
        (
            ["{}/h.jsonl", "--domain_field", "x"],
            "not an object with a `x`; give another field as --domain_field, or leave it",
        ),
        (["{}/i.jsonl", "--domain_field", "x"], "`x` is null, not a string; give another field as --domain_field"),
        (["{}/j.jsonl", "--domain_field", "x"], "no `text`, only `x` (--text_field names another); correct it"),
        (["{}/c.txt", "--domain_field", "x"], "c.txt: plain text has no field 'x'"),
        (["{}/d.jsonl"], "d.jsonl:1: not JSON"),
        (["{}/e.txt"], "e.txt: holds no text"),
        (["{}/a.jsonl", "--seq_length", "1"], "--seq_length is 1"),
        (["{}/a.jsonl", "--mask_p", "1.5"], "--mask_p is 1.5"),
        (["{}/a.jsonl", "--validation_steps", "-1"], "--validation_steps is -1"),
        (["{}", "--output", "{}/a.jsonl"], "is also an input"),
    ],
)
def test_a_mistake_is_one_line(run_dir, tmp_path, capfd, arguments, message):
    contents = {"a.jsonl": '{"text": "a"}\n', "b.safetensors": "", "c.txt": "text", "d.jsonl": "{", "e.txt": " "}
    contents |= {"g.jsonl": '{"text": "a", "x": 1}\n{"text": "b"}', "h.jsonl": '"a"'}
    contents |= {"i.jsonl": '{"text": "a", "x": null}', "j.jsonl": '{"x": "a"}'}
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(SystemExit) as end:
        run_command(EvaluateSettings, evaluate, [str(run_dir), *(each.format(tmp_path) for each in arguments)])
    assert end.value.code == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert "--input" not in line
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == contents


def test_bad_lines_of_all_files_together_are_those_of_data(run_dir, tmp_path):
    files = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    for file in files:
        file.write_text("{\n" * 20)
    with pytest.raises(InputError, match=r"^DATA: 40 of 40 lines are bad"):
        results(run_dir, tmp_path, *files, on_error="skip")


def test_the_help_names_no_flag_of_other_commands(capsys):
    with pytest.raises(SystemExit):
        parse(EvaluateSettings, ["--help"])
    assert "--input" not in capsys.readouterr().out


def test_token_files_of_another_tokenizer_are_refused(run_dir, tmp_path, capfd):
    other = write_inputs(tmp_path, train_characters=20_000)
    with pytest.raises(SystemExit):
        run_command(EvaluateSettings, evaluate, [str(run_dir), str(other / "valid.safetensors")])
    assert "was written with another tokenizer" in capfd.readouterr().err


def with_settings(run_dir, folder, settings):
    """A copy of the run's checkpoint with different settings."""
    (newest,) = (run_dir / "checkpoints").iterdir()
    shutil.copytree(newest, folder)
    (folder / "train_config.json").write_text(json.dumps(settings))
    manifest.write(folder)
    return folder


def test_settings_that_a_folder_does_not_say_are_the_usual_ones(inputs, run_dir, tmp_path):
    imported = with_settings(run_dir, tmp_path / "copy", {"name": "from elsewhere"})
    found = results(imported, tmp_path, inputs / "valid.safetensors")
    assert (found["seq_length"], found["mask_p"]) == (128, 0.15)


@pytest.mark.parametrize("settings", [[], {"seq_length": "long"}, None])
def test_damaged_settings_of_the_run_are_named(run_dir, tmp_path, capfd, settings):
    copy = with_settings(run_dir, tmp_path / "copy", settings)
    if settings is None:  # and inconsistent with the manifest
        (copy / "train_config.json").write_text("{}")
    with pytest.raises(SystemExit):
        run_command(EvaluateSettings, evaluate, [str(copy), str(tmp_path / "any.jsonl")])
    assert "train_config.json: " in capfd.readouterr().err


@pytest.mark.parametrize("name", ["valid.tok", "valid", "valid.jsonl", "valid.gz"])
def test_a_token_file_is_one_under_any_name(inputs, run_dir, tmp_path, name):
    expected = results(run_dir, tmp_path, inputs / "valid.safetensors")["all"]
    shutil.copyfile(inputs / "valid.safetensors", tmp_path / name)
    assert results(run_dir, tmp_path, tmp_path / name)["all"] == expected
    ids = [torch.tensor([1, *range(20, 60)]), torch.tensor([1, 30, 31])]
    torch.save(ids, tmp_path / f"upstream-{name}")
    torch.save(ids, tmp_path / "upstream.bin")
    of_upstream = results(run_dir, tmp_path, tmp_path / "upstream.bin")["all"]
    assert results(run_dir, tmp_path, tmp_path / f"upstream-{name}")["all"] == of_upstream


def test_texts_that_look_like_token_files_are_texts(tmp_path):
    for content in (b'{"text":{"a": 1}}', b"PK is how it begins.", b"{", b"", bytes(8) + b"x"):
        (tmp_path / "a.jsonl").write_bytes(content)
        assert not is_token_file(tmp_path / "a.jsonl")
    assert not is_token_file(tmp_path)


def test_unknown_tokens_are_counted_at_the_end(inputs, run_dir, tmp_path, capsys):
    """With a warning above a limit, and an error where the tokenizer cannot be meant."""
    vocab_size = json.loads((inputs / "model.json").read_text())["vocab_size"]
    for share, said in ((0.0, "0.0% unknown tokens"), (0.2, "WARNING: 20.0% unknown tokens"), (0.9, None)):
        tokens = np.where(np.arange(100) < 100 * share, 0, 20)
        digest = tokenizer_hash(inputs / "tokenizer.json")
        with TokenStoreWriter(tmp_path / "t.safetensors", min(vocab_size, 300), digest) as writer:
            writer.append(tokens, np.array([60, 40]))
        if said is None:
            with pytest.raises(InputError, match=r"DATA: 90% of its tokens are unknown: the tokenizer does not know"):
                results(run_dir, tmp_path, tmp_path / "t.safetensors")
        else:
            assert results(run_dir, tmp_path, tmp_path / "t.safetensors")["unknown_tokens"] == share
            assert f" labels; {said}\n" in capsys.readouterr().out


def test_no_output_replaces_a_file_of_a_run_or_model(run_dir, tmp_path):
    """Runs, checkpoints and exported models; results and reports in their folders may be replaced."""
    export(ExportConfig(run_dir, tmp_path / "exported"))
    folders = [run_dir, run_dir / "checkpoints/step_00000006", tmp_path / "exported"]
    files = [file for folder in folders for file in folder.iterdir() if file.is_file() and file.name != "README.md"]
    assert len(files) > 20
    for file in files:
        with pytest.raises(InputError, match=re.escape(f"{file}: is a file of the run or model in that folder")):
            check_outputs([file], [])
    for folder in folders:
        (folder / "results.json").touch()
    try:
        check_outputs([*(folder / "results.json" for folder in folders), run_dir / "new.safetensors"], [])
    finally:
        for folder in folders:
            (folder / "results.json").unlink()
