"""A checkpoint written on the device is independent of it, and works on any other device."""

import json

import pytest
import torch
from safetensors.torch import load_file

from gptbert.checkpoint.checkpoint import load
from gptbert.checkpoint.folder import list_checkpoints
from gptbert.checkpoint.saved_model import load_model
from gptbert.command_line import parse
from gptbert.config import ModelConfig, TrainConfig
from gptbert.evaluate import EvaluateSettings, evaluate
from gptbert.export import ExportConfig, export
from gptbert.fill_mask import fill_masks
from gptbert.generate import continue_text
from gptbert.model.objective import Objective
from gptbert.monitoring.records import read_records
from gptbert.score import ScoreSettings, score
from gptbert.scoring.likelihood import log_likelihoods
from gptbert.scoring.trained_model import ModelChoice, TrainedModel
from gptbert.text.encoding import encode_sentences
from gptbert.train import fit
from gptbert.upstream import from_upstream
from tests.runs import flags, losses

SENTENCES = ["This is the name of a file.", "It returns a value.", "The statement is executed."]


@pytest.fixture(scope="module")
def settings(device):
    return {
        "device": device.type,
        "seq_length": 16,
        "global_batch_size": 8,
        "max_steps": 6,
        "save_every": 3,
        "validate_every": 3,
        "ema_decay": 0.5,
        "no_compile": True,
        "kernel_check": "off",
        "mask_history": True,
    }


@pytest.fixture(scope="module")
def run_dir(inputs, settings):
    fit(parse(TrainConfig, flags(inputs, name="run", config_file=inputs / "no_dropout.json", **settings)))
    return inputs / "runs" / "run"


@pytest.fixture(scope="module")
def trained(run_dir, device):
    """The same model on the device and on the CPU."""
    return [TrainedModel.load(ModelChoice(run=run_dir, device=name)) for name in (device.type, "cpu")]


def test_everything_is_read_onto_the_cpu(run_dir, inputs, device):
    path = list_checkpoints(run_dir)[-1]
    found = load(path, ModelConfig.from_json(inputs / "no_dropout.json"))
    assert found.step == 6
    assert device.type in found.rank_states[0]["random"]
    moments = [value for values in found.optimizer["state"].values() for value in values.values()]
    assert len(moments) == 3 * len(found.model)
    tensors = [*found.model.values(), *found.ema.values(), *moments, found.skipped_steps, found.mask_counts]
    assert {tensor.device.type for tensor in tensors} == {"cpu"}
    assert found.mask_counts.sum() > 0
    assert all(tensor.isfinite().all() for tensor in tensors)


def test_the_choice_of_a_device_is_kept(trained, device):
    assert [each.device.type for each in trained] == [device.type, "cpu"]


@pytest.mark.parametrize("name", ["cuda", "cpu"])
def test_evaluation_gives_what_the_run_logged(name, run_dir, inputs, device, tmp_path):
    if name == "cuda" != device.type:
        pytest.skip("rehearsed with the CPU's")
    output = tmp_path / "results.json"
    data = (inputs / "valid.safetensors",)
    evaluate(EvaluateSettings(run=run_dir, input=data, output=output, validation_steps=2, device=name))
    found = json.loads(output.read_text())["all"]
    logged = [record for record in read_records(run_dir / "metrics.jsonl") if "validation_ema/mlm/loss" in record][-1]
    for objective in Objective:
        expected = logged[f"validation_ema/{objective.value}/loss"]
        assert found[objective.value]["loss"] == pytest.approx(expected, rel=1e-4)


def test_text_goes_on_from_a_prompt(trained):
    on_device, on_cpu = trained
    texts = [
        continue_text(each.model, each.tokenizer, "The name", num_tokens=12, temperature=0.8, top_k=20, seed=seed)
        for each, seed in ((on_device, 1), (on_device, 1), (on_device, 2), (on_cpu, 1))
    ]
    assert all(text.startswith("The name") for text in texts)
    assert texts[0] == texts[1] != texts[2]
    assert texts[0][:20] == texts[3][:20], "the random numbers are the CPU's"


def test_masks_are_filled_as_on_the_cpu(trained):
    found = [fill_masks(each.model, each.tokenizer, "The<mask> of a<mask>", top_k=5) for each in trained]
    for ours, theirs in zip(*found, strict=True):
        assert [share for _, share in ours] == pytest.approx([share for _, share in theirs], rel=1e-3)


@pytest.mark.parametrize("objective", Objective)
def test_sentences_are_scored_as_on_the_cpu(trained, objective):
    ids = encode_sentences(trained[0].tokenizer, SENTENCES)
    on_device, on_cpu = (log_likelihoods(each.model, ids, objective, (1.0, 2.0)) for each in trained)
    assert on_device.device.type == "cpu"
    torch.testing.assert_close(on_device, on_cpu, rtol=1e-4, atol=1e-4)


def test_pairs_are_scored(run_dir, device, tmp_path):
    pairs, output = tmp_path / "pairs.jsonl", tmp_path / "scores.json"
    lines = [{"sentence_good": one, "sentence_bad": one[::-1], "UID": "x"} for one in SENTENCES]
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    score(ScoreSettings(run=run_dir, pairs=(pairs,), device=device.type, output=output))
    assert json.loads(output.read_text())


@torch.no_grad()
def test_an_exported_folder_holds_the_average(run_dir, device, tmp_path):
    """The export gives the same results in transformers on the device, if transformers is installed."""
    export(ExportConfig(run_dir, tmp_path / "exported"))
    model = load_model(run_dir)
    weights = from_upstream(load_file(tmp_path / "exported" / "model.safetensors"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(weights[name], tensor), name
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported", trust_remote_code=True)
    ids = torch.randint(16, 300, (2, 24), generator=torch.Generator().manual_seed(0)).to(device)
    ours = model.to(device)
    expected = ours.logits(ours.encode(ids, torch.zeros_like(ids), causal=True))
    torch.testing.assert_close(theirs.to(device).eval()(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["cuda", "cpu"])
def test_a_run_goes_on_on_another_kind_of_device(name, run_dir, inputs, settings, device):
    """Without dropout: resuming on a different kind of device gives the losses of the uninterrupted run."""
    if name == "cuda" != device.type:
        pytest.skip("rehearsed with the CPU's")
    again = settings | {"device": name, "config_file": inputs / "no_dropout.json", "cpu_threads": 1}
    if name == "cpu":
        again |= {"kernels": "torch"}
    fit(parse(TrainConfig, flags(inputs, name=f"on-{name}", resume=list_checkpoints(run_dir)[0], **again)))
    records = read_records(inputs / "runs" / f"on-{name}" / "metrics.jsonl")
    expected = [record for record in read_records(run_dir / "metrics.jsonl") if record["step"] > 3]
    assert losses(records) == pytest.approx(losses(expected), rel=1e-3)
