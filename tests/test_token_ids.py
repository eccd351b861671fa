"""Token ids outside the vocabulary never train: ranks check before the first step, and in every row they read."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptbert.command_line import parse, run_command
from gptbert.config import TrainConfig
from gptbert.data import inputs as run_inputs
from gptbert.data.hybrid_plan import HybridPlan
from gptbert.data.packing import RowStream
from gptbert.data.token_store import TokenStore, TokenStoreWriter
from gptbert.errors import InputError
from gptbert.text.tokenizer import tokenizer_hash
from gptbert.train import fit
from tests.runs import flags, on_ranks, write_inputs


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=9).filter(any),
    st.integers(1, 7),
    st.none() | st.integers(0, 9),
    st.data(),
)
def test_the_parts_cover_the_store(lengths, parts, most, data):
    """A store with one bad token at any position is refused by exactly the part that contains it, if it is checked."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(lengths)), max_size=3)))
    total = sum(lengths)
    bad = data.draw(st.integers(0, total - 1), label="position")
    tokens = np.where(np.arange(total) == bad, 16, 15).astype(np.uint8)
    offsets = [np.cumsum([0, *part]) for part in np.split(np.array(lengths), cuts)]
    store = TokenStore(np.split(tokens, np.cumsum([part[-1] for part in offsets])[:-1]), offsets, 16, None)
    refusals = []
    for part in range(parts):
        try:
            store.check_ids(part, parts, most)
        except InputError as error:
            refusals.append((part, str(error)))
    (holder,) = [part for part in range(parts) if total * part // parts <= bad < total * (part + 1) // parts]
    seen = most is None or bad < total * holder // parts + most
    message = "token id 16 in a store of 16 ids; tokenize the corpus again"
    assert refusals == ([(holder, message)] if seen else [])


def damaged(path, tokens, digest, shard_tokens=40):
    """Shards of ten-token documents, with one token id not below the files' vocabulary size."""
    with TokenStoreWriter(path, 2**9, digest, shard_tokens=shard_tokens) as writer:
        writer.append(tokens, np.full(len(tokens) // 10, 10))
    for file in writer.files:
        content = file.read_bytes()
        file.write_bytes(content.replace(b'"vocab_size":"512"', b'"vocab_size":"320"'))
    return writer.files


@pytest.mark.parametrize("bad", [0, 39, 40, 77, 119])
def test_a_piece_that_is_read_is_looked_at(tmp_path, bad):
    tokens = np.arange(120)
    tokens[bad] = 320
    files = damaged(tmp_path / "t.safetensors", tokens, "abc")
    store = TokenStore.open(tmp_path / "t.safetensors")
    for document in range(12):
        piece = np.array([10 * document]), np.array([10])
        if document != bad // 10:
            assert store.gather(*piece)[0].tolist() == tokens[10 * document :][:10].tolist()
            continue
        with pytest.raises(InputError) as refused:
            store.gather(*piece)
        assert str(refused.value) == (
            f"token file {files[bad // 40]}: token id 320 in a store of 320 ids; tokenize the corpus again"
        )


BAD = 4870  # position of the bad token, in a row of step 17


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = write_inputs(tmp_path_factory.mktemp("ids"), train_characters=10_000)
    tokens = np.full(6000, 20)
    tokens[BAD] = 511
    damaged(folder / "bad.safetensors", tokens, tokenizer_hash(folder / "tokenizer.json"), shard_tokens=2000)
    return folder


def test_before_the_first_step_where_ranks_read_that_far(inputs, capfd):
    with pytest.raises(SystemExit):
        run_command(TrainConfig, fit, flags(inputs, name="early", train_path=inputs / "bad.safetensors"))
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: --train_path: token file {inputs}/bad-00003-of-00003.safetensors: token id 511 in")
    assert not (inputs / "runs" / "early").exists()


def unlucky_run(inputs, **changes):
    return flags(inputs, train_path=inputs / "bad.safetensors", save_every=2, max_steps=60, log_every=7, **changes)


def first_step_with(config, position):
    """The first step with a row that contains the token at this position of the store."""
    store = TokenStore.open(*config.train_path)
    store = TokenStore(store.shards, store.document_offsets, 2**16, None)
    plan = HybridPlan(config, world_size=1)
    streams = [RowStream(store, config.seq_length, (config.seed, index)) for index in range(2)]
    for step in range(config.max_steps):
        for share, stream in zip(plan.shares(step, 0), streams, strict=True):
            if position in stream.rows(share.first_slot, share.num_rows, share.length_factor).positions:
                return step
    raise AssertionError("the run never meets it")


def test_a_bad_token_id_that_the_start_does_not_see_ends_the_run(inputs, monkeypatch, capfd):
    monkeypatch.setattr(run_inputs, "CHECKED_TOKENS", 100)
    arguments = unlucky_run(inputs, name="late", keep_checkpoints=99)
    step = first_step_with(parse(TrainConfig, arguments), BAD)
    with pytest.raises(SystemExit):
        run_command(TrainConfig, fit, arguments)
    assert "--train_path: token file" in capfd.readouterr().err.splitlines()[-1]
    saved = [int(path.name.removeprefix("step_")) for path in (inputs / "runs" / "late" / "checkpoints").iterdir()]
    assert step == 17 >= max(saved), "no checkpoint has trained without the row"
    assert min(saved) == 2, "and those before it are there"


def late_on_two_ranks(rank, inputs, results):
    run_inputs.CHECKED_TOKENS = 100
    try:
        fit(parse(TrainConfig, unlucky_run(inputs, name="two", hybrid_denominator=2)))
    except InputError as error:
        results.put((rank, str(error)))


def test_what_one_rank_meets_in_the_run_ends_all_of_them(inputs):
    said = on_ranks(2, late_on_two_ranks, inputs)
    assert said[0] == said[1]
    assert said[0].startswith("--train_path: token file ")
    assert "token id 511 in a store of 320 ids" in said[0]
