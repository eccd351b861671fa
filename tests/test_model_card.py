"""The model card of an exported folder, and what `export` says below its work."""

import json
import re
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from gptbert.command_line import run_command
from gptbert.errors import InputError
from gptbert.export import ExportConfig, Origin, export, model_card
from tests.exported import SHAPE, write_checkpoint
from tests.runs import train


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("card"))[0]


@pytest.mark.usefixtures("bf16_everywhere")
def test_a_run_says_on_its_card_what_it_was(checkpoint, tmp_path, capsys):
    inputs = checkpoint.parent / "inputs"
    settings = {"hybrid_denominator": 3, "validate_every": 2, "mixed_precision": True, "checkpoint_words": "120"}
    records = train(inputs, "with-a-card", max_steps=4, **settings)
    run_dir = inputs / "runs" / "with-a-card"
    export(ExportConfig(run_dir, tmp_path / "out", words=True))
    noted = [line for line in capsys.readouterr().err.splitlines() if "average of the weights" in line]
    assert len(noted) == 1
    assert noted[0].startswith("step_00000004: warning: after 4 steps the average of the weights still has 100% of")
    export(ExportConfig(run_dir, tmp_path / "themselves", weights="model"))
    assert "average of the weights" not in capsys.readouterr().err
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    loss = records[-1]["validation_ema/mlm/loss"]
    tokens = next(record["train/tokens"] for record in reversed(records) if "train/tokens" in record)
    for part in ("# with-a-card", "step 4 of 4", "| masked share | 1/3", f"| masked | {loss:.3f} |", f"{tokens:,}",
                 ", 1 process |", "train.safetensors", "bf16", "after step 4"):  # fmt: skip
        assert part in card, part
    assert not re.search(r"\bnan\b", card.lower())
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o044  # readable by other users
    by_words = tmp_path / "out" / "chck_120"  # a checkpoint by words is complete on its own, as it will become a branch
    words = json.loads((run_dir / "words" / "chck_120" / "words.json").read_text())
    card = (by_words / "README.md").read_text()
    assert f"step {words['step']} of 4 ({words['words']:,} words seen)" in card
    assert ("## Validation" in card) == (words["step"] >= 2)
    weights = [load_file(folder / "model.safetensors") for folder in (by_words, run_dir / "words" / "chck_120")]
    assert torch.equal(
        AutoModel.from_pretrained(by_words, trust_remote_code=True).embedding.relative_embedding,
        weights[0]["embedding.relative_embedding"],
    )
    assert weights[0]["classifier.nonlinearity.5.bias"].shape == weights[1]["classifier.nonlinearity.5.bias"].shape
    export(ExportConfig(run_dir, tmp_path / "babylm", babylm=True))
    for folder in (tmp_path / "babylm", tmp_path / "babylm" / "chck_120"):
        assert json.loads((folder / "config.json").read_text())["masked_logits_alignment"] == "previous"


def test_checkpoints_by_words_need_a_model_and_no_more(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "run/checkpoints/step_00000001")
    shutil.copytree(checkpoint, tmp_path / "run/words/chck_1M")
    weights = load_file(checkpoint / "ema.safetensors")
    halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    save_file(halves, tmp_path / "run/words/chck_1M/ema.safetensors")
    (tmp_path / "run/words/chck_1M/manifest.json").unlink()
    export(ExportConfig(tmp_path / "run", tmp_path / "out", words=True))
    exported = load_file(tmp_path / "out/chck_1M/model.safetensors")
    assert {tensor.dtype for tensor in exported.values()} == {torch.float32}, "as its config.json says"
    (tmp_path / "run/words/chck_2M").mkdir()
    with pytest.raises(InputError, match="chck_2M: neither a checkpoint nor a run"):
        export(ExportConfig(tmp_path / "run", tmp_path / "none", words=True))
    assert not (tmp_path / "none").exists()


def test_a_checkpoint_alone_has_a_card_too(checkpoint):
    card = model_card(Origin.of(checkpoint), SHAPE, "ema", shift=False, name="x")
    assert "# a run" in card
    assert "Validation" not in card
    assert "mntp`" in card


def front_matter(folder):
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


def test_licence_languages_and_data_are_on_the_card(checkpoint, tmp_path):
    flags = ["--license", "cc-by-4.0", "--language", "no", "en", "--datasets", "me/corpus", "squad"]
    run_command(ExportConfig, export, [str(checkpoint), str(tmp_path / "out"), *flags])
    found = front_matter(tmp_path / "out")
    # Norwegian's code is a boolean in YAML unless it is quoted
    expected = {"license": "cc-by-4.0", "language": ["no", "en"], "datasets": ["me/corpus", "squad"]}
    assert {key: found[key] for key in expected} == expected
    assert found["library_name"] == "transformers"
    export(ExportConfig(checkpoint, tmp_path / "without"))
    assert set(front_matter(tmp_path / "without")) == {"library_name", "pipeline_tag", "tags"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"license": "Apache 2.0"}, "--license 'Apache 2.0': expected a name in lower case such as apache-2.0"),
        ({"license": ""}, "--license '': expected"),
        ({"language": ("en", "English")}, "--language 'English': expected codes of two or three letters such as en nb"),
        ({"datasets": ("a corpus",)}, "--datasets 'a corpus': expected names on Hugging Face's hub"),
        ({"datasets": ("https://example.org/a",)}, "--datasets 'https://example.org/a': expected names"),
    ],
)
def test_what_the_hub_would_not_take_is_refused(checkpoint, tmp_path, settings, message):
    with pytest.raises(InputError, match=re.escape(message)):
        ExportConfig(checkpoint, tmp_path / "out", **settings)


def test_code_names_its_licence(checkpoint, tmp_path):
    export(ExportConfig(checkpoint, tmp_path / "out"))
    files = list((tmp_path / "out").glob("*.py"))
    assert len(files) == 5
    for file in files:
        assert file.read_text().startswith("# SPDX-License-Identifier: Apache-2.0\n"), file
