"""Every reader of external files, each followed by a use of its result: success means the result is usable."""

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from gptbert.checkpoint import checkpoint, manifest
from gptbert.checkpoint.foreign import read_foreign
from gptbert.checkpoint.resume import changed_schedules, changed_settings, check_settings
from gptbert.checkpoint.saved_model import load_model
from gptbert.config import ModelConfig, TrainConfig
from gptbert.data.packing import RowStream
from gptbert.data.token_store import TokenStore
from gptbert.io.torch_file import load_torch_file
from gptbert.model import GPTBert
from gptbert.monitoring.records import read_records
from gptbert.monitoring.validation import ValidationSettings
from gptbert.optim import Lamb
from gptbert.scoring.minimal_pairs import Accuracy, read_pairs
from gptbert.text.corpus import Corpus, CorpusConfig
from gptbert.text.encoding import encode_documents, encode_sentences
from gptbert.text.tokenizer import load_tokenizer, notes, special_ids, tokenizer_hash
from tests.conftest import TINY

DOCUMENTS = 1 << 16


def tokens(path: Path) -> None:
    """A token file or a `.bin`: rows can be built, and every id is below the vocabulary size in the store."""
    store = TokenStore.open(path)
    store.check_ids()
    rows = RowStream(store, 4).rows(0, 3)
    assert rows.tokens.shape == (3, 5)
    assert 0 <= rows.tokens.min() <= rows.tokens.max() < max(store.vocab_size, 5)
    gathered = 0
    for first in range(0, store.num_documents, DOCUMENTS):  # all of them at once would need more memory than the file
        ids, _ = store.gather(*store.documents(first, min(first + DOCUMENTS, store.num_documents)))
        gathered += len(ids)
    assert gathered == store.num_tokens


def model_config(path: Path) -> None:
    """A model configuration: the model can be built on the meta device."""
    config = ModelConfig.from_json(path)
    with torch.device("meta"):
        model = GPTBert(config)
    assert sum(param.numel() for param in model.parameters()) == config.num_parameters


def tokenizer(path: Path) -> None:
    """A tokenizer: a text has one encoding, to ids of its vocabulary, in which special tokens are text."""
    loaded = load_tokenizer(path)
    assert len(tokenizer_hash(path)) == 64
    assert all(isinstance(note, str) for note in notes(path, loaded))
    size, special = loaded.get_vocab_size(), special_ids(loaded)
    assert special[:5] == tuple(range(5))
    text = "the fox, 1 or 2"
    ids = loaded.encode(text).ids
    assert all(0 <= token_id < size for token_id in ids)
    assert isinstance(loaded.decode(ids), str)
    assert all(encode_sentences(loaded, [text]) == [ids] for _ in range(3))
    for flat, *_ in encode_documents(loaded, [text, "", "é\n", " a <mask>", "</s>", "<pad>a<s>"]):
        assert not len(flat) or flat.max() < size
        assert not set(flat.tolist()) & {1, 2, 3, 4}
    again = Tokenizer.from_str(loaded.to_str())
    assert again.encode(text).ids == ids


def resumed(path: Path) -> None:
    """A checkpoint to resume from: model and optimizer load it."""
    loaded = checkpoint.load(path, TINY)
    model, ema = GPTBert(TINY), GPTBert(TINY)
    model.load_state_dict(loaded.model)
    ema.load_state_dict(loaded.ema)
    optimizer = Lamb(model.parameters())
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": loaded.optimizer["state"], "param_groups": groups})
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert type(loaded.step) is int
    for state in loaded.rank_states:
        torch.Generator().set_state(state["random"]["cpu"])
        torch.zeros(2, 4, dtype=torch.float64).copy_(state["sums"])


def resumed_settings(path: Path) -> None:
    """The settings in a checkpoint."""
    tokenizer_path = path / "tokenizer.json"
    config = TrainConfig((tokenizer_path,), *[tokenizer_path] * 3)
    check_settings(path, config)
    changed_settings(path, config)
    changed_schedules(path, 1, config)
    ValidationSettings.from_json(path)


def model(path: Path) -> None:
    """A checkpoint's model: a forward succeeds."""
    loaded = load_model(path)
    ids = torch.zeros(1, 3, dtype=torch.long)
    assert loaded.encode(ids, ids, causal=True).shape == (1, 3, loaded.config.hidden_size)


def checked(path: Path) -> None:
    """A checkpoint's manifest: every file matches it."""
    manifest.check(path)


def state(path: Path) -> None:
    """Any torch.save file."""
    load_torch_file(path)


def foreign(path: Path) -> None:
    """Weights of others: named tensors."""
    found = read_foreign([path])
    assert all(isinstance(tensor, torch.Tensor) for state in (found.model, found.ema) for tensor in state.values())


def records(path: Path) -> None:
    """The records of a run: read, and usable for resuming."""
    assert all(isinstance(record["step"] + 0, int | float) for record in read_records(path))


def corpus(path: Path) -> None:
    """Documents: all of them are text."""
    for on_error in ("skip", "stop"):
        for text in Corpus(CorpusConfig(input=(path,), on_error=on_error)):
            text.encode()


def pairs(path: Path) -> None:
    """Minimal pairs: both sentences are text, and all pairs have the same grouping fields."""
    found = read_pairs([path])
    for pair in found:
        assert "".join([pair.good, pair.bad, *pair.groups.values()]).encode()
    Accuracy.of(found, np.zeros(len(found)), np.ones(len(found)))


READERS = {
    "tokens": tokens, "model_config": model_config, "tokenizer": tokenizer, "resumed": resumed,
    "resumed_settings": resumed_settings, "manifest": checked, "model": model, "state": state, "foreign": foreign,
    "records": records, "corpus": corpus, "pairs": pairs,
}  # fmt: skip
