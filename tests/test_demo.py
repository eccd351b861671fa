"""Filling masks, continuing a text, and what `make demo` shows of a run."""

import math

import pytest
import torch

from gptbert.command_line import parse
from gptbert.config import TrainConfig
from gptbert.demo import DemoSettings, show
from gptbert.errors import InputError
from gptbert.fill_mask import fill_masks
from gptbert.generate import continue_text
from gptbert.tokenizer import BOS_ID, MASK_ID, load_tokenizer
from gptbert.trainer import fit
from gptbert.validation import unigram_entropy
from tests.runs import flags, write_inputs


class AddOne:
    """A stand-in for the model: it predicts token id + 1 from each position, and remembers what it was shown."""

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size
        self.calls = []

    def parameters(self):
        return iter([torch.zeros(1)])

    def encode(self, input_ids, document_ids, causal):
        self.calls.append((input_ids, document_ids, causal))
        return input_ids.unsqueeze(-1)

    def logits(self, hidden):
        return 20 * torch.nn.functional.one_hot(hidden.squeeze(-1) + 1, self.vocab_size).float()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = write_inputs(tmp_path_factory.mktemp("demo"))
    fit(parse(TrainConfig, flags(folder, name="demo", max_steps=3, validate_every=2)))
    return folder


@pytest.fixture
def tokenizer(inputs):
    return load_tokenizer(inputs / "tokenizer.json")


def test_a_mask_is_predicted_from_the_position_before_it(tokenizer):
    model = AddOne(320)
    (first, second) = fill_masks(model, tokenizer, "a<mask> b<mask>", top_k=2)
    ((ids, documents, causal),) = model.calls
    assert ids[0, 0] == BOS_ID
    assert (ids == MASK_ID).sum() == 2
    assert not causal
    assert (documents == 0).all()
    assert len(first) == 2
    masks = (ids[0] == MASK_ID).nonzero().squeeze(-1)
    expected = [tokenizer.decode([int(ids[0, mask - 1]) + 1]) for mask in masks]
    assert [first[0][0], second[0][0]] == expected
    assert first[0][1] > 0.99


def test_a_text_without_masks_is_refused(tokenizer):
    with pytest.raises(InputError, match="no <mask>"):
        fill_masks(AddOne(320), tokenizer, "nothing to fill")


def test_greedy_continuation_takes_the_likeliest(tokenizer):
    model = AddOne(320)
    start = tokenizer.encode("a").ids
    text = continue_text(model, tokenizer, "a", num_tokens=3, temperature=0)
    assert text == tokenizer.decode([*start, *(start[-1] + i for i in (1, 2, 3))])
    assert all(causal for _, _, causal in model.calls)


def test_sampling_depends_on_the_seed_alone_and_never_gives_special_tokens(inputs, tokenizer):
    class Flat(AddOne):
        def logits(self, hidden):
            flat = torch.zeros(*hidden.shape[:-1], self.vocab_size)
            flat[..., : MASK_ID + 1] = 9.0  # the likeliest tokens are special
            return flat

    texts = [continue_text(Flat(320), tokenizer, "a", 30, top_k=320, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert "<" not in continue_text(Flat(320), tokenizer, "a", 5, top_k=1)


def test_unigram_entropy():
    assert unigram_entropy(torch.tensor([5, 5, 7, 9])) == pytest.approx(1.5 * math.log(2))
    assert unigram_entropy(torch.full((10,), 3)) == 0


def test_show_prints_everything_and_writes_the_report(inputs, capsys):
    show(DemoSettings(run_dir=inputs / "runs/demo", valid_path=inputs / "valid.safetensors", margin=-10))
    output = capsys.readouterr().out
    for text in ("masked (MLM)", "causal (CLM)", "unigram", "→", "Continuation", "checkpoints/step_00000003"):
        assert text in output
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
