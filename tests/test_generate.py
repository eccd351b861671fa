"""Continuing texts and filling masks: the model's inputs, the tokens that may be chosen, and the commands."""

from pathlib import Path

import pytest
import torch

from gptbert.command_line import parse, run_command
from gptbert.config import TrainConfig
from gptbert.errors import InputError
from gptbert.fill_mask import FillMaskSettings, fill_mask, fill_masks, masks_behind_lone_spaces
from gptbert.generate import GenerateSettings, continue_text, distribution, generate
from gptbert.scoring.trained_model import ModelChoice, TrainedModel
from gptbert.text.encoding import encode_sentences
from gptbert.text.special_tokens import BOS_ID, MASK_ID, SPECIAL_TOKENS
from gptbert.text.tokenizer import load_tokenizer, ordinary_ids
from gptbert.train import fit
from tests.runs import flags, write_inputs


class AddOne:
    """A fake model: predicts token id + 1 at each position, and records its inputs."""

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size
        self.calls = []

    def parameters(self):
        return iter([torch.zeros(1)])

    def encode(self, input_ids, document_ids, causal):
        self.calls.append((input_ids, document_ids, causal))
        return input_ids.unsqueeze(-1)

    def encode_next(self, input_ids, cache):
        return self.encode(input_ids, None, causal=True)

    def logits(self, hidden):
        return 20 * torch.nn.functional.one_hot(hidden.squeeze(-1) + 1, self.vocab_size).float()


class SpecialFirst(AddOne):
    """Its likeliest tokens are special ones and ones that the tokenizer lacks."""

    def logits(self, hidden):
        scores = torch.zeros(*hidden.shape[:-1], self.vocab_size + 8)
        scores[..., : len(SPECIAL_TOKENS)] = 9.0
        scores[..., self.vocab_size :] = 9.0
        return scores


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = write_inputs(tmp_path_factory.mktemp("generate"), train_characters=10_000)
    fit(parse(TrainConfig, flags(folder, name="run", max_steps=3)))
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


def test_a_mask_may_come_first_and_a_text_without_masks_is_refused(tokenizer):
    ((guess,),) = fill_masks(SpecialFirst(320), tokenizer, "<mask>", top_k=1)
    assert guess[1] == pytest.approx(1 / (320 - len(SPECIAL_TOKENS)))
    with pytest.raises(InputError, match="no <mask>"):
        fill_masks(AddOne(320), tokenizer, "nothing to fill")
    encode_sentences(tokenizer, ["sets the tokenizer to plain text"])
    assert len(fill_masks(AddOne(320), tokenizer, "a<mask>")) == 1


def test_masks_behind_a_space_are_told(tokenizer):
    """What such a space is, the tokenizer decides: one without spaces in its tokens has none."""
    assert masks_behind_lone_spaces(tokenizer, "a<mask> b <mask> c\n<mask><mask> d") == [2]
    assert masks_behind_lone_spaces(tokenizer, "<mask>") == []


def test_special_tokens_fill_no_mask(tokenizer):
    (candidates,) = fill_masks(SpecialFirst(320), tokenizer, "a<mask>", top_k=1000)
    assert len(candidates) == 320 - len(SPECIAL_TOKENS) == len(ordinary_ids(tokenizer))
    assert sum(probability for _, probability in candidates) == pytest.approx(1)
    assert not {text for text, _ in candidates} & {"", *SPECIAL_TOKENS}


def test_greedy_continuation_takes_the_likeliest(tokenizer):
    model = AddOne(320)
    start = tokenizer.encode("a").ids
    text = continue_text(model, tokenizer, "a", num_tokens=3, temperature=0)
    assert text == tokenizer.decode([*start, *(start[-1] + i for i in (1, 2, 3))])
    assert all(causal for _, _, causal in model.calls)


def test_greedy_is_the_argmax_of_a_real_model(inputs, tokenizer):
    trained = TrainedModel.load(ModelChoice(run=inputs / "runs/run"))
    ids = encode_sentences(tokenizer, ["The name"])[0]
    for _ in range(5):
        with torch.no_grad():
            states = trained.model.encode(torch.tensor([ids]), torch.zeros(1, len(ids)), causal=True)
            logits = trained.model.logits(states)[0, -1]
        ids.append(len(SPECIAL_TOKENS) + int(logits[len(SPECIAL_TOKENS) : 320].argmax()))
    for settings in ({"temperature": 0}, {"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-30}):
        assert continue_text(trained.model, tokenizer, "The name", 5, **settings) == tokenizer.decode(ids), settings


def test_sampling_depends_on_the_seed_alone_and_never_gives_special_tokens(tokenizer):
    texts = [continue_text(SpecialFirst(320), tokenizer, "a", 30, top_k=0, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert all(len(text) > 20 for text in texts), "special tokens would be left out of the text"
    assert "<" not in continue_text(SpecialFirst(320), tokenizer, "a", 5, top_k=1)


def test_special_tokens_in_a_prompt_are_plain_text(tokenizer):
    model = AddOne(320)
    prompt = "a <mask> </s>"
    assert continue_text(model, tokenizer, prompt, 1, temperature=0).startswith(prompt)
    ids = model.calls[0][0][0].tolist()
    assert ids[0] == BOS_ID
    assert min(ids[1:]) >= len(SPECIAL_TOKENS)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_k": 9}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_p": 0.3}, [0, 1, 0, 0]),
        ({"top_p": 0.41}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.69}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.71}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"top_p": 0.95}, [0.1, 0.4, 0.2, 0.3]),
        # of the three likeliest, 4/9 and 3/9 are 7/9; of all, 0.4 and 0.3 would not reach 0.75
        ({"top_k": 3, "top_p": 0.75}, [0, 4 / 7, 0, 3 / 7]),
        # squares are 1, 16, 4 and 9 of 30: the largest is above one half; at temperature 1 it is not
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        ({"temperature": 0.5, "top_p": 0.5}, [0, 1, 0, 0]),
    ],
)
def test_top_k_top_p_and_temperature_by_hand(settings, expected):
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log() + 5
    found = distribution(logits, **{"temperature": 1.0, "top_k": 0, "top_p": 1.0, **settings})
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-7)


def test_the_ends_of_what_settings_may_be_are_taken():
    for settings in ({"top_k": 0}, {"temperature": 0}, {"top_p": 1}, {"seed": 2**32 - 1}, {"num_tokens": 1}):
        GenerateSettings(run=Path("run"), prompt="", **settings)


def test_generate_and_fill_mask_print_what_their_functions_return(inputs, tokenizer, capsys):
    run = str(inputs / "runs/run")
    run_command(GenerateSettings, generate, [run, "The name", "--num_tokens", "5", "--num_samples", "2", "--seed", "3"])
    output = capsys.readouterr().out
    model = TrainedModel.load(ModelChoice(run=inputs / "runs/run")).model
    samples = [continue_text(model, tokenizer, "The name", 5, seed=seed) for seed in (3, 4)]
    assert output == f"--- seed 3\n{samples[0]}\n--- seed 4\n{samples[1]}\n"
    run_command(FillMaskSettings, fill_mask, [run, "a<mask> of<mask>", "--top_k", "2", "--weights", "model"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert "mask 2" in lines[0]
    (first, _) = fill_masks(
        TrainedModel.load(ModelChoice(run=inputs / "runs/run", weights="model")).model, tokenizer, "a<mask> of<mask>"
    )
    assert repr(first[0][0]) in lines[1]
    assert f"{first[0][1]:.1%}" in lines[1]


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("generate", ["a", "--temperature", "-1"], "--temperature is -1.0"),
        ("generate", ["a", "--temperature", "nan"], "--temperature is nan"),
        ("generate", ["a", "--top_k", "-1"], "--top_k is -1"),
        ("generate", ["a", "--top_p", "0"], "--top_p is 0.0"),
        ("generate", ["a", "--top_p", "1.1"], "--top_p is 1.1"),
        ("generate", ["a", "--num_tokens", "0"], "--num_tokens is 0"),
        ("generate", ["a", "--num_samples", "0"], "--num_samples is 0"),
        ("generate", ["a", "--seed", "-1"], "--seed is -1"),
        ("generate", ["a\udce9"], r"text 'a\udce9': is not UTF-8"),
        ("fill_mask", ["a<mask>\udce9"], "is not UTF-8"),
        ("fill_mask", ["nothing"], "no <mask> in 'nothing'"),
        ("fill_mask", ["a<mask>", "--top_k", "0"], "--top_k is 0"),
        ("fill_mask", ["a<mask>", "--weights", "best"], "--weights"),
        ("fill_mask", ["a<mask>", "--device", "cuda"], "--device cuda: torch sees no GPU"),
    ],
)
def test_a_mistake_is_one_line(inputs, capfd, command, arguments, message):
    commands = {"generate": (GenerateSettings, generate), "fill_mask": (FillMaskSettings, fill_mask)}
    with pytest.raises(SystemExit) as end:
        run_command(*commands[command], [str(inputs / "runs/run"), *arguments])
    assert end.value.code in {1, 2}
    output = capfd.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith("error: ")
    assert message in line
