"""The Python API: the page's example, hooks, models from any folder, scores, and names that are there in any order."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import gptbert
from gptbert import TrainConfig, load_model, score, train
from gptbert.command_line import parse
from gptbert.errors import InputError
from gptbert.export import ExportConfig, export
from gptbert.model.objective import Objective
from gptbert.scoring.likelihood import log_likelihoods
from gptbert.text.encoding import encode_sentences
from tests.runs import ROOT, assert_same_end, flags, on_ranks, write_inputs

TEXTS = ["The statement is executed.", "It return a value.", ""]
SHORT = {"no_compile": True, "kernels": "torch", "max_steps": 4, "validation_steps": 1, "log_every": 2}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("python"), train_characters=20_000)


def config_of(inputs, **changes):
    return parse(TrainConfig, flags(inputs, **(SHORT | changes)))


@pytest.fixture(scope="module")
def run(inputs):
    """A run's result, and what its hooks were called with."""
    calls = []
    result = train(
        config_of(inputs, name="hooked", validate_every=3, save_every=2),
        on_step=lambda step, record: calls.append(("step", step, record)),
        on_validation=lambda step, record: calls.append(("validation", step, record)),
        on_checkpoint=lambda step, path: calls.append(("checkpoint", step, path, path.is_dir())),
    )
    return result, calls


def test_hooks_are_called_with_what_was_recorded(run):
    result, calls = run
    assert [call[:2] for call in calls] == [
        ("step", 2), ("checkpoint", 2), ("validation", 3), ("step", 4), ("checkpoint", 4), ("validation", 4)
    ]  # fmt: skip
    assert calls[3][2].items() <= result.training.items()
    assert calls[5][2].items() <= result.validation.items()
    assert result.training["step"] == result.validation["step"] == result.step == 4
    assert "train/loss" in result.training
    assert "validation/mlm/loss" in result.validation
    assert calls[4][2:] == (result.checkpoint, True)
    assert result.checkpoint == result.run_dir / "checkpoints" / "step_00000004"


def test_a_run_that_is_over_has_the_same_result(inputs, run):
    result, calls = run
    before = len(calls)
    assert train(config_of(inputs, name="hooked", resume="auto", validate_every=3, save_every=2)) == result
    assert len(calls) == before


@pytest.mark.parametrize("hook", ["on_step", "on_validation", "on_checkpoint"])
def test_a_hook_that_fails_ends_the_run(inputs, hook):
    def fails(step, value):
        raise KeyError("gone")

    with pytest.raises(InputError, match=f"^{hook} failed after step 2: KeyError: 'gone'$") as caught:
        train(config_of(inputs, name=f"fails_{hook}", validate_every=2, save_every=2), **{hook: fails})
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_hook_that_draws_random_numbers_changes_nothing(inputs, run):
    def looks(step, value):
        torch.manual_seed(step)
        if isinstance(value, Path):
            score(load_model(value, device="cpu"), TEXTS)

    hooks = dict.fromkeys(("on_step", "on_validation", "on_checkpoint"), looks)
    result = train(config_of(inputs, name="looked_at", validate_every=3, save_every=2), **hooks)
    assert_same_end(result.run_dir, run[0].run_dir)


def _fails_on_the_main_rank(rank, arguments, has_hook, results):
    def fails(step, record):
        raise ValueError(f"rank {rank}")

    try:
        train(parse(TrainConfig, arguments), on_step=fails if has_hook[rank] else None)
    except InputError as error:
        results.put((rank, str(error)))


@pytest.mark.parametrize(
    ("has_hook", "message"),
    [([True, True], "on_step failed after step 2: ValueError: rank 0"), ([True, False], "different flags or hooks")],
)
def test_all_ranks_end_with_the_same_line(inputs, has_hook, message):
    arguments = flags(inputs, **(SHORT | {"name": f"ranks_{has_hook[1]}"}))
    said = on_ranks(2, _fails_on_the_main_rank, arguments, has_hook)
    assert said[0] == said[1]
    assert message in said[0]


def test_scores_are_those_of_the_command(run):
    loaded = load_model(run[0].run_dir, device="cpu")
    assert loaded.path == run[0].checkpoint
    assert not loaded.model.training
    ids = encode_sentences(loaded.tokenizer, TEXTS)
    for backend, objective in (("causal", Objective.CLM), ("mntp", Objective.MLM)):
        expected = log_likelihoods(loaded.model, ids, objective, (2.0,))[:, 0].numpy()
        found = score(loaded, TEXTS, backend=backend, temperature=2.0)
        assert np.array_equal(found, expected)
        assert found[2] == 0
        pairs = score(loaded, [(TEXTS[0], TEXTS[1]), (TEXTS[1], TEXTS[2])], backend=backend, temperature=2.0)
        assert pairs.shape == (2, 2)
        np.testing.assert_allclose(pairs, [found[:2], found[1:]], rtol=1e-6)
    assert score(loaded, []).shape == (0,)
    assert np.array_equal(score(loaded, (text for text in TEXTS)), score(loaded, TEXTS))
    expected = score(loaded, TEXTS)
    loaded.model.train()
    assert np.array_equal(score(loaded, TEXTS), expected), "without dropout"
    assert loaded.model.training
    loaded.model.eval()
    for texts in ("one text", [("a",)], ["a", ("b", "c")], [("a", "b"), "cd"], [3]):
        with pytest.raises(InputError, match="expected a list of texts, or a list of pairs"):
            score(loaded, texts)
    for wrong in ({"backend": "mlm"}, {"temperature": 0}, {"batch_tokens": 0}):
        with pytest.raises(InputError, match=f"^{next(iter(wrong))} is .*, expected"):
            score(loaded, TEXTS, **wrong)


def test_models_come_from_checkpoints_and_from_exported_folders(run, tmp_path, capsys):
    export(ExportConfig(run[0].run_dir, tmp_path / "exported"))
    capsys.readouterr()
    exported, own = load_model(str(tmp_path / "exported"), device="cpu"), load_model(run[0].checkpoint, device="cpu")
    assert capsys.readouterr().out == ""
    assert exported.path == tmp_path / "exported"
    for name, tensor in own.model.state_dict().items():
        assert torch.equal(exported.model.state_dict()[name], tensor)
    assert exported.tokenizer.get_vocab() == own.tokenizer.get_vocab()
    plain = load_model(run[0].run_dir, weights="model", device="cpu").model.state_dict()
    assert any(not torch.equal(plain[name], tensor) for name, tensor in own.model.state_dict().items())
    with pytest.raises(InputError, match="there is no such folder"):
        load_model(tmp_path / "nowhere")
    for wrong in ({"weights": "average"}, {"device": "gpu"}):
        with pytest.raises(InputError, match=f"^{next(iter(wrong))} is '.*', expected one of"):
            load_model(tmp_path, **wrong)


def test_settings_may_be_given_as_python_has_them(make_config):
    config = make_config(train_path="a", valid_path="b", trackers=[], initial_weights="c", train_weights=[1.0])
    assert (config.train_path, config.valid_path, config.initial_weights) == ((Path("a"),), Path("b"), Path("c"))
    assert (config.trackers, config.train_weights) == ((), (1.0,))
    assert make_config(train_path=["a", Path("b")]).train_path == (Path("a"), Path("b"))
    hash(config)
    with pytest.raises(InputError, match=r"^--parallel is 'dpp', expected one of ddp, fsdp$"):
        make_config(parallel="dpp")
    with pytest.raises(InputError, match=r"^--trackers is 'wand', expected one of wandb, tensorboard$"):
        make_config(trackers=["wandb", "wand"])


def test_numbers_may_be_of_any_kind_and_texts_are_none(make_config):
    config = make_config(seed=np.int64(3), global_batch_size=16.0, learning_rate=np.float32(0.5), save_steps=2, name=7)
    assert (config.seed, config.global_batch_size, config.learning_rate) == (3, 16, 0.5)
    assert {type(config.seed), type(config.global_batch_size)} == {int}
    assert (config.save_steps, config.name) == ((2,), "7")
    assert make_config(checkpoint_words=[300]).checkpoint_words == ("300",)
    for name, value, expected in (
        ("learning_rate", "1e-3", "a number"), ("max_steps", 2.5, "a whole number"),
        ("max_steps", True, "a whole number"),
        ("mixed_precision", "no", "True or False"), ("resume", True, "a text"), ("valid_path", 3, "a path"),
        ("log_every", None, "a whole number"), ("save_steps", [2, "x"], "a whole number"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=f"^--{name} is .*, expected {expected}$"):
            make_config(**{name: value})


def test_a_run_file_is_not_ignored(make_config):
    with pytest.raises(InputError, match="run_file: is read by the command line only"):
        train(make_config(run_file="run.yaml"))


def test_the_names_are_there_whatever_was_imported_before():
    """Here, the modules of these names were; in another process, nothing was."""
    script = """
import sys, gptbert
assert "torch" not in sys.modules
try:
    gptbert.nothing
except AttributeError as error:
    assert "nothing" in str(error)
from gptbert import TrainConfig, score
assert "gptbert.train" not in sys.modules
assert callable(score) and callable(gptbert.train)
import gptbert.train
from gptbert.train import fit
assert gptbert.train.fit is fit and callable(gptbert.train)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {"gptbert.train", "gptbert.score"} <= sys.modules.keys()
    for name in ("train", "score"):
        assert getattr(gptbert, name) is globals()[name] is sys.modules[f"gptbert.{name}"]
    assert list(inspect.signature(train).parameters) == ["config", "on_step", "on_validation", "on_checkpoint"]
    assert list(inspect.signature(score).parameters)[:2] == ["model", "texts"]


def test_the_pages_example_runs(inputs, tmp_path, monkeypatch, capsys):
    """As it stands, except for sizes, and with other files."""
    (example,) = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs" / "python.md").read_text(), re.MULTILINE | re.DOTALL
    )
    smaller = {
        "max_steps=500": 'max_steps=2, compile=False, kernels="torch", cpu_threads=1, validation_steps=1, trackers=()',
        "log_every=10": "log_every=1",
        "seq_length=128": "seq_length=32",
        "global_batch_size=32": "global_batch_size=8",
    }
    for setting, other in smaller.items():
        assert example.count(f"    {setting},\n") == 1
        example = example.replace(setting, other)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work").mkdir()
    for name, file in (("train", "train"), ("validation", "valid")):
        (tmp_path / "work" / f"{name}.safetensors").symlink_to(inputs / f"{file}.safetensors")
    (tmp_path / "work" / "tokenizer.json").symlink_to(inputs / "tokenizer.json")
    exec(compile(example, "python.md", "exec"), {})  # noqa: S102  our own page
    said = capsys.readouterr().out
    assert "work/runs/python/checkpoints/step_00000002" in said
    assert len(re.findall(r"-\d+\.\d+", said)) >= 4
