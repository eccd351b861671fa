"""Sample predictions: choice of texts and masks, and the records made of the answers."""

from contextlib import nullcontext

import pytest
import torch

from gptbert.command_line import parse
from gptbert.config import TrainConfig
from gptbert.data.inputs import Inputs
from gptbert.data.token_store import TokenStore
from gptbert.distributed.world import World
from gptbert.model import GPTBert
from gptbert.monitoring.records import read_records
from gptbert.monitoring.samples import NUM_TEXTS, TOP, Samples
from gptbert.text.special_tokens import BOS_ID, MASK_ID
from gptbert.text.tokenizer import load_tokenizer
from gptbert.train import fit
from tests.runs import flags, write_inputs

ALONE = World(0, 1, torch.device("cpu"))


class AfterTheLast(torch.nn.Module):
    """A fake model: predicts the next higher id at each position, with probability near 1."""

    def encode(self, input_ids, document_ids, causal):
        self.seen = (input_ids, document_ids, causal, self.training)
        return input_ids.unsqueeze(-1)

    def logits(self, hidden_states):
        return 20 * torch.nn.functional.one_hot(hidden_states.squeeze(-1) + 1, 330).float()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("samples"))


def make_samples(inputs, store=None, **changes):
    config = parse(TrainConfig, flags(inputs, **changes))
    return Samples(config, store or TokenStore.open(config.valid_path), ALONE)


def test_masks_hide_a_few_ordinary_tokens_of_the_middle_of_documents(inputs):
    model, tokenizer = AfterTheLast(), load_tokenizer(inputs / "tokenizer.json")
    records = make_samples(inputs, seq_length=64)(model, nullcontext())
    input_ids, document_ids, causal, training = model.seen
    assert model.training
    assert not training
    assert not causal
    assert input_ids.shape == (NUM_TEXTS, 64)
    assert (document_ids == torch.tensor([0] * 49 + [-1] * 15)).all()
    store = TokenStore.open(inputs / "valid.safetensors")
    for row, start, length, record in zip(input_ids, *store.documents(), records, strict=True):
        text = store.shards[0][start + (length - 48) // 2 :][:48].astype(int)
        masked = row[1:49] == MASK_ID
        assert row[0] == BOS_ID
        assert masked.sum() == 5
        assert (row[1:49][~masked].numpy() == text[~masked.numpy()]).all()
        assert record["text"].count("<mask>") == 5
        assert record["answers"] == [tokenizer.decode([token]) for token in text[masked.numpy()]]
        whole = record["text"]
        for answer in record["answers"]:
            whole = whole.replace("<mask>", answer, 1)
        assert whole == tokenizer.decode(text.tolist())
        before = row[:-1][row[1:] == MASK_ID]
        assert [len(mask) for mask in record["guesses"]] == [TOP] * 5
        for (best, *others), token in zip(record["guesses"], before.tolist(), strict=True):
            assert best == [tokenizer.decode([token + 1], skip_special_tokens=False), 1.0]
            assert [share for _, share in others] == [0.0] * 2
    assert len({tuple((row == MASK_ID).nonzero().flatten().tolist()) for row in input_ids}) > 1, "places differ"
    assert make_samples(inputs, seq_length=64, seed=5)(model, nullcontext()) == records


def test_special_tokens_and_short_documents(inputs, make_store):
    """Long documents come first; documents of special tokens only are left out; a row may be shorter than a text."""
    lengths = [2, 0, 3, 30, 1, 9]
    tokens = [7, 8, *(100, 9, 101), *range(200, 230), 5, *range(50, 59)]
    model = AfterTheLast()
    records = make_samples(inputs, make_store(lengths, tokens=tokens), seq_length=16)(model, nullcontext())
    input_ids, document_ids, *_ = model.seen
    assert [len(record["answers"]) for record in records] == [2, 1, 1]
    assert (document_ids >= 0).sum(1).tolist() == [16, 10, 4]
    assert input_ids[2, 2] == 9, "special, and so never masked"
    assert make_samples(inputs, make_store([3], tokens=[5, 6, 7]))(model, nullcontext()) == []


def test_sampling_changes_nothing_and_says_the_same_again(inputs):
    config = parse(TrainConfig, flags(inputs))
    model = GPTBert(Inputs.open(config).model_config)  # with dropout
    samples = make_samples(inputs)
    state = torch.get_rng_state()
    first = samples(model, nullcontext())
    assert samples(model, nullcontext()) == first
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    shares = [share for record in first for mask in record["guesses"] for _, share in mask]
    assert 0 < min(shares) <= max(shares) < 1


def test_a_run_samples_at_each_validation(inputs):
    fit(parse(TrainConfig, flags(inputs, name="run", max_steps=5, validate_every=2)))
    records = read_records(inputs / "runs" / "run" / "samples.jsonl")
    assert [record["step"] for record in records] == [2] * 4 + [4] * 4 + [5] * 4
    assert records[0]["text"] == records[4]["text"]
    assert records[0]["guesses"] != records[4]["guesses"]
    assert set(records[0]) == {"step", "text", "answers", "guesses"}
