"""Folders with a model, whatever they are called, wherever they lie, whoever wrote them, in all commands."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gptbert.checkpoint import checkpoint, manifest
from gptbert.checkpoint.folder import list_checkpoints, newest_in, run_dir_of, saved_step
from gptbert.checkpoint.initial_weights import read_initial_weights
from gptbert.checkpoint.resume import find
from gptbert.checkpoint.saved_model import corpora_seen
from gptbert.config import ModelConfig
from gptbert.errors import InputError
from gptbert.evaluate import EvaluateSettings, evaluate
from gptbert.export import ExportConfig, export
from gptbert.generate import GenerateSettings, generate
from gptbert.import_hf import ImportConfig, import_hf
from gptbert.report import write_report
from tests.runs import train, write_inputs
from tests.tokenizer_kinds import kinds

STEPS = 3


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    inputs = write_inputs(tmp_path_factory.mktemp("folders"), train_characters=20_000)
    settings = {"no_compile": True, "validation_steps": 1, "validate_every": 0}
    train(inputs, "first", max_steps=STEPS, checkpoint_words="200", **settings)
    train(inputs, "second", max_steps=1, seed=7, **settings)
    return inputs


@pytest.fixture
def run_dir(inputs, tmp_path):
    """A copy of the first run's folder, elsewhere."""
    shutil.copytree(inputs / "runs" / "first", tmp_path / "elsewhere")
    return tmp_path / "elsewhere"


def newest(run_dir):
    return list_checkpoints(run_dir)[-1]


def moved(run_dir, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    return newest(run_dir).rename(target)


def imported(run_dir):
    export(ExportConfig(run_dir, run_dir / "exported"))
    import_hf(ImportConfig(run_dir / "exported", run_dir / "imported"))
    return run_dir / "imported"


def without(run_dir, *names, folder="checkpoints/alone"):
    path = moved(run_dir, run_dir / folder)
    for name in names:
        (path / name).unlink()
    return path


def linked(run_dir, target):
    link = run_dir.parent / "link"
    link.symlink_to(target)
    return link


def in_another_run(run_dir):
    second = run_dir.parent / "second"
    shutil.copytree(Path(json.loads((run_dir / "config.json").read_text())["train"]["output_dir"]) / "second", second)
    shutil.rmtree(second / "checkpoints")
    return moved(run_dir, second / "checkpoints" / "theirs")


def here(path):
    os.chdir(path)
    return Path()


# folders, and what is known there: the step, and whether the run's records are found
FOLDERS = {
    "the run": (lambda run: run, STEPS, True),
    "the run's checkpoints": (lambda run: run / "checkpoints", STEPS, True),
    "a checkpoint": (newest, STEPS, True),
    "the current folder, a checkpoint": (lambda run: here(newest(run)), STEPS, True),
    "the current folder, a run": (here, STEPS, True),
    "renamed": (lambda run: moved(run, run / "checkpoints" / "step_00000003_best"), STEPS, True),
    "renamed, by the run": (lambda run: moved(run, run / "checkpoints" / "best").parents[1], STEPS, True),
    "named after another step": (lambda run: moved(run, run / "checkpoints" / "step_00000099"), STEPS, True),
    "named step_": (lambda run: moved(run, run / "checkpoints" / "step_"), STEPS, True),
    "beside the checkpoints": (lambda run: moved(run, run / "best"), STEPS, False),
    "far away": (lambda run: moved(run, run.parent / "a" / "b" / "c"), STEPS, False),
    "at the top": (lambda run: moved(run, run.parent / "top"), STEPS, False),
    "a link to a checkpoint": (lambda run: linked(run, newest(run)), STEPS, True),
    "a link to a run": (lambda run: linked(run, run), STEPS, True),
    "in another run": (in_another_run, STEPS, False),
    "by words": (lambda run: run / "words" / "chck_200", "by words", True),
    "imported": (imported, None, False),
    "without settings": (lambda run: without(run, "train_config.json", "manifest.json"), STEPS, False),
    "without a training state": (lambda run: without(run, "training_state.pt"), None, True),
    "without a manifest": (lambda run: without(run, "manifest.json"), STEPS, True),
    "written by hand": (
        lambda run: without(run, "manifest.json", "train_config.json", "training_state.pt", folder="x"), None, False),
}  # fmt: skip


@pytest.fixture
def quiet_directory():
    before = Path.cwd()
    yield
    os.chdir(before)


@pytest.mark.usefixtures("quiet_directory")
@pytest.mark.parametrize("kind", FOLDERS)
def test_every_command_takes_every_folder_that_holds_a_model(inputs, run_dir, make_config, kind, capsys):
    make, step, has_records = FOLDERS[kind]
    path = make(run_dir)
    expected = load_file(newest_in(path) / "ema.safetensors")
    output = run_dir.parent / "out"
    export(ExportConfig(path, output))
    exported = load_file(output / "model.safetensors")
    assert all(torch.equal(exported[name], expected[name]) for name in exported)
    card = (output / "README.md").read_text()
    if step == "by words":
        step = json.loads((path / "words.json").read_text())["step"]
    assert saved_step(newest_in(path)) == step
    assert (f"from step {step}" in card) == (step is not None)
    assert ("None" in card) is False
    assert (kind != "imported") == ("the weights' moving average" in card)
    assert (run_dir_of(newest_in(path)) is not None) == has_records
    assert ("tokens seen" in card) == (step is not None), "the checkpoint itself says it"
    generate(GenerateSettings(run=path, prompt="A", num_tokens=1))
    evaluate(EvaluateSettings(run=path, input=(inputs / "valid.safetensors",), validation_steps=1, seq_length=32))
    assert "ema weights" in capsys.readouterr().out
    settings = make_config(initial_weights=path, tokenizer_path=inputs / "tokenizer.json")
    assert read_initial_weights(settings, ModelConfig.from_json(inputs / "model.json"))
    if has_records and step:
        assert write_report(path).resolve() == (run_dir_of(newest_in(path)) / "report.html").resolve()


def test_a_link_to_the_checkpoints_of_another_run_is_theirs(inputs, run_dir, tmp_path):
    shutil.copytree(inputs / "runs" / "second", tmp_path / "second")
    link = tmp_path / "second" / "theirs"
    link.symlink_to(run_dir / "checkpoints")
    assert newest_in(link).resolve() == newest(run_dir).resolve()


@pytest.mark.parametrize("kind", [kind for kind, (_, step, _) in FOLDERS.items() if step == STEPS])
@pytest.mark.usefixtures("quiet_directory")
def test_a_run_goes_on_from_a_checkpoint_of_any_name(inputs, run_dir, make_config, kind):
    path = newest_in(FOLDERS[kind][0](run_dir)).absolute()
    if not (path / "manifest.json").exists():
        return
    assert find(make_config(resume=str(path), output_dir=run_dir.parent / "new")) == path
    shape = ModelConfig.from_json(inputs / "model.json")
    if kind == "named after another step":
        with pytest.raises(InputError, match=r"its name says step 99, and its training_state.pt step 3; rename"):
            checkpoint.load(path, shape)
    else:
        assert checkpoint.load(path, shape).step == STEPS


def test_the_newest_checkpoint_is_the_same_by_any_path(run_dir, make_config, monkeypatch):
    monkeypatch.chdir(run_dir.parent)
    path = newest(run_dir)
    for resume, output_dir in ((path, Path()), (path.relative_to(run_dir.parent), run_dir.parent)):
        assert find(make_config(resume=str(resume), output_dir=output_dir, name=run_dir.name)).resolve() == path


def test_messages_say_what_a_folder_is_and_the_way_on(run_dir, tmp_path):
    export(ExportConfig(run_dir, tmp_path / "exported"))
    shutil.copytree(run_dir, tmp_path / "words", ignore=shutil.ignore_patterns("checkpoints"))
    shutil.copytree(newest(run_dir), tmp_path / "several" / "a")
    shutil.copytree(newest(run_dir), tmp_path / "several" / "b")
    (tmp_path / "begun").mkdir()
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/model.safetensors").touch()
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(run_dir / name, tmp_path / "begun" / name)
    shutil.copytree(run_dir, tmp_path / "copies/strange")
    (tmp_path / "copies/strange/checkpoints/step_00000099").mkdir()
    for path, message in (
        (
            tmp_path / "copies/strange",
            "step_00000099: is named like the newest checkpoint, and holds no model_config.json",
        ),
        (tmp_path / "exported", "neither .* but a folder for transformers; python -m gptbert.import_hf makes one"),
        (newest(run_dir) / "ema.safetensors", r"but a file; name the folder that it is in \(.*step_00000003\)"),
        (tmp_path / "words", "one with checkpoints by words; name one of .*words/words"),
        (tmp_path / "several", r"holds several models \(a, b\); name one"),
        (tmp_path / "begun", "has not saved one yet"),
        (tmp_path / "weights", "neither a checkpoint nor a run with checkpoints$"),
        (tmp_path / "gone", "there is no such folder"),
        (run_dir.parent, r", but a folder of runs \(elsewhere\); name one"),
    ):
        with pytest.raises(InputError, match=message):
            newest_in(path)
    with pytest.raises(InputError, match="a checkpoint without its run's records"):
        write_report(tmp_path / "several" / "a")


@pytest.mark.parametrize(
    ("lacks", "message"),
    [
        ("ema.safetensors", "has no ema.safetensors, only model.safetensors; --weights model"),
        ("tokenizer.json", "has no tokenizer.json; copy the one that the model was trained with into it"),
        ("model_config.json", "neither a checkpoint nor a run"),
    ],
)
def test_what_is_needed_is_named(run_dir, tmp_path, lacks, message):
    path = without(run_dir, lacks, folder="alone")
    for work in (
        lambda: export(ExportConfig(path, tmp_path / "out")),
        lambda: generate(GenerateSettings(run=path, prompt="A")),
    ):
        with pytest.raises(InputError, match=message):
            work()
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_is_not_the_models_is_refused(run_dir, make_config, inputs, tmp_path):
    """One that was put in place of the one that the checkpoint was saved with; its manifest says so."""
    path = newest(run_dir)
    (path / "tokenizer.json").write_text(kinds()["sixty-five special tokens"])
    settings = make_config(initial_weights=path, tokenizer_path=path / "tokenizer.json")
    for work in (
        lambda: export(ExportConfig(path, tmp_path / "out")),
        lambda: generate(GenerateSettings(run=path, prompt="A")),
        lambda: read_initial_weights(settings, ModelConfig.from_json(inputs / "model.json")),
    ):
        with pytest.raises(InputError, match=r"tokenizer\.json: \d+ bytes instead of \d+"):
            work()


@pytest.mark.parametrize(
    ("progress", "digests"),
    [
        ({"corpora": [{"digest": "one"}, {"digest": "other"}]}, {"one", "other"}),
        ({"corpora": ["odd", {"digest": "one"}]}, {"one"}),
        ({"corpora": 3}, set()),
        ({}, set()),
        ("odd", set()),
    ],
)
def test_what_an_odd_state_says_of_its_corpora_is_taken_as_far_as_it_goes(tmp_path, progress, digests):
    torch.save({"progress": progress}, tmp_path / "training_state.pt")
    assert corpora_seen(tmp_path) == digests


def test_half_a_save_is_no_model(run_dir):
    path = without(run_dir, "manifest.json", folder="checkpoints/.step_00000009.incomplete")
    with pytest.raises(InputError, match=r"manifest.json: no such file"):
        generate(GenerateSettings(run=path, prompt="A"))


def test_odd_settings_cost_facts_and_not_the_card(run_dir, tmp_path, capfd):
    path = newest(run_dir)
    odd = {"name": "first", "max_steps": "many", "seq_length": None, "train_path": 3, "train_weights": "x", "seed": [1]}
    (path / "train_config.json").write_text(json.dumps(odd))
    (path / "training_state.pt").write_bytes(b"no state")
    manifest.write(path)
    export(ExportConfig(path, tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert re.search(r"Exported: the weights' moving average", card)
    assert "its step is unknown" in capfd.readouterr().err
    (run_dir / "config.json").write_text("{")
    export(ExportConfig(path, tmp_path / "again"))
    assert "records of" in capfd.readouterr().err
