"""Sentence scores against a plain loop: one sentence, one mask and one temperature at a time, without padding."""

import pytest
import torch

from gptbert.model import GPTBert
from gptbert.model.objective import Objective
from gptbert.scoring import likelihood
from gptbert.scoring.likelihood import log_likelihoods, num_predictions
from gptbert.text.special_tokens import BOS_ID, MASK_ID

TEMPERATURES = (0.5, 1.0, 2.65)


@pytest.fixture(scope="module")
def model(tiny):
    torch.manual_seed(1)
    model = GPTBert(tiny).eval()
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.3)  # otherwise all tokens would be about equally likely, whatever the input
    return model


@pytest.fixture(scope="module")
def sentences():
    """Lengths 0 … 11 with repetitions, one beyond the largest distance of 32, and two that differ in one token."""
    torch.manual_seed(2)
    lengths = [3, 11, 0, 5, 5, 1, 8, 40, 2, 7]
    drawn = [[BOS_ID, *torch.randint(16, 64, (length,)).tolist()] for length in lengths]
    return [*drawn, [*drawn[3][:-1], 16]]


@torch.no_grad()
def plain_score(model, sentence, objective, temperature, offset=-1):
    """The definition; `offset` is the position of a token's logits, relative to the token."""
    total = 0.0
    for position in range(1, len(sentence)):
        ids = torch.tensor([sentence[:position] if objective.causal else sentence])
        if not objective.causal:
            ids[0, position] = MASK_ID
        hidden_states = model.encode(ids, torch.zeros_like(ids), objective.causal)
        logits = model.logits(hidden_states[0, position + offset])
        total += (logits / temperature).log_softmax(-1)[sentence[position]].item()
    return total


@pytest.mark.parametrize("objective", Objective)
@pytest.mark.parametrize("batch_tokens", [1, 50, 10_000])
def test_scores_are_those_of_the_plain_loop(model, sentences, objective, batch_tokens, monkeypatch):
    monkeypatch.setattr(likelihood, "_LOGITS", 64 * 5)  # several chunks, the last of them smaller
    made = []
    scores = log_likelihoods(model, sentences, objective, TEMPERATURES, batch_tokens, made.append)
    expected = [[plain_score(model, sentence, objective, each) for each in TEMPERATURES] for sentence in sentences]
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    assert scores[2].tolist() == [0, 0, 0]
    assert sum(made) == num_predictions(sentences) == sum(len(sentence) - 1 for sentence in sentences)


def test_reading_the_mask_itself_would_be_another_score(model, sentences):
    """The test above must be able to detect an off-by-one."""
    wrong = [plain_score(model, sentence, Objective.MLM, 1.0, offset=0) for sentence in sentences if len(sentence) > 1]
    right = [plain_score(model, sentence, Objective.MLM, 1.0) for sentence in sentences if len(sentence) > 1]
    assert min(abs(one - other) for one, other in zip(wrong, right, strict=True)) > 1e-2


@pytest.mark.parametrize("objective", Objective)
def test_batches_keep_to_their_size_and_equal_sentences_tie(model, sentences, objective, monkeypatch):
    shapes = []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda ids, *rest: (shapes.append(ids.shape), encode(ids, *rest))[1])
    twice = [*sentences, *reversed(sentences)]
    scores = log_likelihoods(model, twice, objective, batch_tokens=64)
    assert torch.equal(scores, scores.flip(0)), "whatever batches they would be in"
    assert all(rows * length <= 64 or rows == 1 for rows, length in shapes)
    rows = sum(rows for rows, _ in shapes)
    assert rows == (10 if objective.causal else num_predictions(sentences)), "each distinct sentence is scored once"


@pytest.mark.parametrize("objective", Objective)
def test_temperatures_share_forwards_and_change_nothing_for_each_other(model, sentences, objective, monkeypatch):
    separate = [log_likelihoods(model, sentences, objective, [each]) for each in TEMPERATURES]
    calls = []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda *args: (calls.append(1), encode(*args))[1])
    together = log_likelihoods(model, sentences, objective, TEMPERATURES)
    assert torch.equal(together, torch.cat(separate, dim=1))
    assert len(calls) == 1


def test_nothing_to_score(model):
    assert log_likelihoods(model, [], Objective.CLM, TEMPERATURES).shape == (0, 3)
    assert log_likelihoods(model, [[BOS_ID]], Objective.MLM).tolist() == [[0]]
