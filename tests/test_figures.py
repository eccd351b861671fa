"""Figures that would show a mistake: shares of long documents, padding and unknown tokens, labels of a step."""

from pathlib import Path

import numpy as np
import pytest

from gptbert.command_line import parse
from gptbert.config import TrainConfig
from gptbert.data.hybrid_plan import HybridPlan
from gptbert.data.inputs import Inputs
from gptbert.data.progress import Progress
from gptbert.model.objective import Objective
from gptbert.monitoring.figures import of_labels, of_rows, of_validation
from gptbert.schedules import steps_since_due
from gptbert.text.special_tokens import UNK_ID
from gptbert.train import fit
from tests.runs import flags, write_inputs


def lines_of(make_config, tiny, *stores, **changes):
    config = make_config(train_path=tuple(map(Path, "ab"[: len(stores)])), **changes)
    inputs = Inputs(tiny, 64, stores, stores[0])
    return of_rows(config, inputs, Progress(config, inputs, HybridPlan(config, 1)))


def test_rows_by_hand(make_store, make_config, tiny):
    """Documents of 9, 5 and 8 tokens, two of them longer than rows of 5; 25 positions with their `<s>`, five rows."""
    settings = {"seq_length": 5, "max_steps": 3}
    (line,) = lines_of(make_config, tiny, make_store([9, 5, 8]), **settings)
    assert line == (
        "rows of 5 tokens: 67% of the documents are longer than a row and cut, 0.00% of an epoch's positions are "
        "padding, 0.00% of the tokens are unknown"
    )
    line, warning = lines_of(make_config, tiny, make_store([9, 5, 8]), make_store([5]), **settings)  # 6 of 10 positions
    assert "50% of the documents" in line
    assert "11.43% of an epoch's positions" in line
    assert "a shorter --seq_length has less" in warning


def test_unknown_tokens_are_warned_of(make_store, make_config, tiny):
    tokens = np.full(1000, 40)
    for unknown, count in ((10, 1), (11, 2)):
        tokens[:unknown] = UNK_ID
        lines = lines_of(make_config, tiny, make_store([999, 1], tokens=tokens), seq_length=8, max_steps=3)
        assert len(lines) == count
        assert f"{unknown / 10:.2f}% of the tokens are unknown" in lines[0]
    assert "a tokenizer that was not made for such text" in lines[1]


@pytest.mark.parametrize("shared", [0, 1, 2, 100])
def test_validation_documents_that_are_trained_on_are_warned_of(make_store, tiny, shared):
    """Whole documents: those of equal beginnings, or only cut alike, are others."""
    tokens = np.random.default_rng(7).integers(16, 64, (300, 20))
    other = tokens[:100].copy()
    other[shared:, 18] = 63 - (other[shared:, 18] - 16)  # no token is its own opposite
    stores = [make_store([20] * len(part), tokens=part.ravel()) for part in (tokens[200:], tokens, other)]
    lines = of_validation(Inputs(tiny, 64, tuple(stores[:2]), stores[2]))
    assert [line.partition("%")[0] for line in lines] == ([f"warning: at least {shared}.0"] if shared > 1 else [])
    short = make_store([15] * 4, tokens=np.full(60, 20))
    assert not of_validation(Inputs(tiny, 64, (short,), short)), "short ones repeat in any text"


def test_labels_of_a_step():
    assert of_labels({Objective.MLM: 200.0, Objective.CLM: 12_345.0}, 10) == [
        "labels in each of the last steps: 20 masked, 1,234 causal"
    ]
    assert "so few masked labels" in of_labels({Objective.MLM: 99.0, Objective.CLM: 5000.0}, 10)[1]
    assert [steps_since_due(step, 10) for step in (1, 10, 11, 25)] == [1, 10, 1, 5]


@pytest.mark.parametrize("changes", [{"max_steps": 7, "log_every": 5}, {"max_steps": 3, "log_every": 10}])
def test_a_run_says_them(tmp_path_factory, capfd, changes):
    inputs = write_inputs(tmp_path_factory.mktemp("figures"), 6000)
    settings = {"no_compile": True, "validation_steps": 1, "batch_reduction": 1, "hybrid_numerator": 0, **changes}
    fit(parse(TrainConfig, flags(inputs, name="said", **settings)))
    said = capfd.readouterr().err
    assert "rows of 32 tokens: " in said
    labels = int(said.partition("labels in each of the last steps: ")[2].split()[0])
    assert 16 * 32 * 0.95 < labels <= 16 * 32, "all but <s>"
    fit(parse(TrainConfig, flags(inputs, name="said", **settings | {"max_steps": 9, "resume": "auto"})))
    labels = int(capfd.readouterr().err.partition("labels in each of the last steps: ")[2].split()[0])
    assert 16 * 32 * 0.95 < labels <= 16 * 32, "in fewer steps than since a record was due"
