"""What `make demo` prints about a run."""

import math

import pytest
import torch

from gptbert.command_line import parse
from gptbert.config import TrainConfig
from gptbert.demo import DemoSettings, show
from gptbert.errors import InputError
from gptbert.monitoring.validation import unigram_entropy
from gptbert.train import fit
from tests.runs import flags, write_inputs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = write_inputs(tmp_path_factory.mktemp("demo"))
    fit(parse(TrainConfig, flags(folder, name="demo", max_steps=3, validate_every=2)))
    return folder


def test_unigram_entropy_is_that_of_the_counts():
    assert unigram_entropy(torch.tensor([5, 5, 7, 9])) == pytest.approx(1.5 * math.log(2))
    assert unigram_entropy(torch.full((10,), 3)) == 0


def test_show_prints_everything_and_writes_the_report(inputs, capsys):
    show(DemoSettings(run_dir=inputs / "runs/demo", valid_path=inputs / "valid.safetensors", margin=-10))
    output = capsys.readouterr().out
    for text in ("masked (MLM)", "causal (CLM)", "unigram", "→", "Continuation", "checkpoints/step_00000003"):
        assert text in output
    header, masked, causal, unigram = output.split("tokens\n")[1].splitlines()[:4]
    assert header.split() == ["loss", "(nats)", "perplexity", "accuracy", "below", "unigram"]
    assert len(header) == len(masked) == len(causal) > len(unigram)
    page = inputs / "runs/demo/report.html"
    assert str(page) in output
    said = page.read_text(encoding="utf-8")
    for text in ("finished after 3 steps", "Loss (nats a token)", "Masks filled"):
        assert text in said


def test_show_fails_where_a_run_learnt_too_little(inputs):
    with pytest.raises(InputError, match=r"less than 0\.8 nat below"):
        show(DemoSettings(run_dir=inputs / "runs/demo", valid_path=inputs / "valid.safetensors"))


def test_show_needs_a_finished_run(inputs, tmp_path):
    with pytest.raises(InputError, match="no finished run"):
        show(DemoSettings(run_dir=tmp_path, valid_path=inputs / "valid.safetensors"))
