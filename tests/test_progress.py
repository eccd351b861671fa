"""What a run has trained on is counted, and continued, whatever settings it is resumed with."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from gptbert.checkpoint import manifest
from gptbert.checkpoint.folder import list_checkpoints
from gptbert.command_line import parse
from gptbert.config import TrainConfig
from gptbert.data.hybrid_plan import HybridPlan
from gptbert.data.inputs import Inputs
from gptbert.data.progress import Progress, check_state, fresh_state
from gptbert.data.token_store import TokenStore
from gptbert.errors import InputError
from gptbert.export import Origin, _facts
from gptbert.model.objective import Objective
from gptbert.monitoring.records import read_records
from gptbert.schedules import batch_size, sequence_length
from gptbert.train import fit
from tests.runs import flags, write_inputs

legs = st.fixed_dictionaries(
    {
        "seq_length": st.sampled_from([3, 4, 8]),
        "global_batch_size": st.integers(8, 20),
        "batch_reduction": st.sampled_from([1.0, 2.0]),
        "seq_length_growth": st.booleans(),
        "hybrid_numerator": st.integers(0, 4),
        "max_steps": st.integers(6, 14),
    }
)


def positions(progress, config, steps):
    """Store positions of every token trained in these steps, in order, by objective; and the tokens of the input."""
    found, tokens = {objective: [] for objective in Objective}, 0
    for step in steps:
        for share in progress.plan.shares(step, 0):
            rows = progress.streams[share.objective].rows(share.first_slot, share.num_rows, share.length_factor)
            found[share.objective].append(rows.positions[:, 1:].ravel())
        tokens += batch_size(config, step) * sequence_length(config, step)
    return {key: np.concatenate([[], *parts]).astype(int) for key, parts in found.items()}, tokens


@settings(max_examples=60, deadline=None)
@given(
    st.lists(legs, min_size=2, max_size=3),
    st.lists(st.lists(st.integers(1, 9), min_size=3, max_size=9), min_size=1, max_size=2),
)
def test_no_token_is_skipped_or_repeated_whatever_changes(make_store, make_config, tiny, legs, corpora):
    """Legs of two steps each, with other settings; each corpus is read epoch by epoch, in its order."""
    stores = tuple(
        make_store(part, tokens=16 + np.arange(sum(part)) + 100 * number) for number, part in enumerate(corpora)
    )
    inputs = Inputs(tiny, 64, stores, stores[0])
    paths = tuple(map(Path, "ab"[: len(stores)]))
    state, trained, tokens = None, {objective: [] for objective in Objective}, 0
    for number, leg in enumerate(legs):
        config = make_config(
            train_path=paths, train_weights=tuple(1.0 + number * index for index in range(len(paths))), **leg
        )
        progress = Progress(config, inputs, HybridPlan(config, 1), state, 2 * number)
        found, more = positions(progress, config, (2 * number, 2 * number + 1))
        for objective in Objective:
            trained[objective].append(found[objective])
        tokens += more
        state = progress.state_dict(2 * number + 2)
        check_state(state)
        assert progress.plan.tokens_before(2 * number + 2) == state["tokens"] == tokens
        undisturbed = Progress(config, inputs, HybridPlan(config, 1), progress.state_dict(2 * number), 2 * number)
        assert undisturbed.state_dict(config.max_steps) == progress.state_dict(config.max_steps)
    borders = np.cumsum([0, *map(sum, corpora)])
    for index, objective in enumerate(Objective):
        seen = np.concatenate(trained[objective])
        for corpus, size in enumerate(map(sum, corpora)):
            own = seen[(seen >= borders[corpus]) & (seen < borders[corpus + 1])] - borders[corpus]
            whole, rest = divmod(len(own), size)
            for epoch in range(whole):
                assert sorted(own[epoch * size : (epoch + 1) * size]) == list(range(size))
            assert len(set(own[whole * size :])) == rest
            place = state["corpora"][corpus]["places"][index]
            assert whole - place[0] in {0, 1}, "1: all but its last `<s>` was read"


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": -1}, {"slots": [0]}, {"rows": [0, 1.5]}, {"corpora": [{}]}, {"more": 1},
        *({"corpora": [{"digest": "", "shuffle": [], "length": 4, "num_words": 3, "places": [[0, 1], [2, 3]]} | wrong]}
          for wrong in ({"places": [[0, 4], [0, 0]]}, {"places": [[0, 0]]}, {"length": True}, {"num_words": 2**80})),
    ],
)  # fmt: skip
def test_what_cannot_be_a_state_is_refused(change):
    check_state(fresh_state())
    with pytest.raises(InputError, match="its progress has an unexpected form"):
        check_state(fresh_state() | change)


# Whole runs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = write_inputs(tmp_path_factory.mktemp("progress"), train_characters=20_000)
    shutil.copyfile(folder / "train.safetensors", folder / "moved.safetensors")
    return folder


def train(inputs, name, **changes):
    settings = {
        "no_compile": True, "batch_reduction": 1, "global_batch_size": 8, "validation_steps": 1, "validate_every": 0,
        "save_every": 3, "resume": "auto", "max_steps": 3,
    }  # fmt: skip
    fit(parse(TrainConfig, flags(inputs, name=name, **settings | changes)))
    records = read_records(inputs / "runs" / name / "metrics.jsonl")
    return {record["step"]: record for record in records if "train/tokens" in record}


def words_of(run_dir):
    return {path.name: json.loads((path / "words.json").read_text()) for path in sorted((run_dir / "words").iterdir())}


def per_token(inputs):
    """Words per token of the training file, `<s>` included."""
    store = TokenStore.open(inputs / "train.safetensors")
    return store.num_words / (store.num_tokens + store.num_documents)


@pytest.mark.parametrize(
    "change",
    [
        {"global_batch_size": 32},
        {"global_batch_size": 12, "batch_reduction": 3},
        {"seq_length": 48},
        {"seq_length_growth": True, "global_batch_size": 16},
        {"hybrid_numerator": 3},
        {"max_steps": 14},
    ],
    ids=str,
)
def test_counts_are_of_what_was_trained(inputs, change, capfd):
    name = f"counts {sorted(change)}"
    before = train(inputs, name, checkpoint_words=[100])[3]
    records = train(inputs, name, **{"max_steps": 8, "checkpoint_words": [100, 150, 200, 300]} | change)
    tokens = 0
    for step in sorted(records):
        tokens += records[step]["train/batch_size"] * records[step]["train/sequence_length"]
        assert records[step]["train/tokens"] == tokens
        assert records[step]["train/words"] == pytest.approx(tokens * per_token(inputs), rel=0.03, abs=2)
    said = capfd.readouterr().err
    assert f"words that the run sees, {before['train/words']:,} of them before this start: " in said
    assert f"of the {records[max(records)]['train/words']:,} words that the run sees" in said
    store = TokenStore.open(inputs / "train.safetensors")
    epochs = records[max(records)]["train/tokens"] / (store.num_tokens + store.num_documents)
    (line,) = re.findall(r"^training on train \(([\d,]+) tokens, ([\d.]+) epochs in all\)$", said, re.MULTILINE)[1:]
    assert (line[0], float(line[1])) == (f"{store.num_tokens:,}", pytest.approx(epochs, rel=0.03))
    written = words_of(inputs / "runs" / name)
    for words in (100, 150, 200, 300):
        step = next(step for step, record in sorted(records.items()) if record["train/words"] >= words)
        expected = {"step": step} | {name: records[step][f"train/{name}"] for name in ("words", "tokens")}
        if step > 3 or words == 100:
            assert written.pop(f"chck_{words}") == expected
        else:
            assert f"passed before this start, so not written: chck_{words}" in said
    assert not written


def test_a_run_that_changed_and_was_killed_ends_as_the_undisturbed_one(inputs):
    for name, cuts in (("changed", [9]), ("changed-killed", [5, 9])):
        train(inputs, name)
        for end in cuts:  # --max_steps stays the same; a branch of a checkpoint stands for a kill
            if end < 9:
                train(inputs, name, max_steps=9, save_every=1, keep_checkpoints=9, global_batch_size=20)
                for path in list_checkpoints(inputs / "runs" / name)[end:]:
                    shutil.rmtree(path)
        records = train(inputs, name, max_steps=9, save_every=1, keep_checkpoints=9, global_batch_size=20)
        assert records[9]["train/tokens"] == 32 * (3 * 8 + 6 * 20)
    ends = [list_checkpoints(inputs / "runs" / name)[-1] for name in ("changed", "changed-killed")]
    states = [torch.load(path / "training_state.pt", weights_only=True)["progress"] for path in ends]
    assert states[0] == states[1]
    assert (ends[0] / "model.safetensors").read_bytes() == (ends[1] / "model.safetensors").read_bytes()


def test_corpora_are_known_by_their_content(inputs):
    """A file is moved, another one added, the first left out and taken up again: words count, and places stay."""
    (first, second) = (inputs / f"{name}.safetensors" for name in ("train", "valid"))
    moved = inputs / "moved.safetensors"
    state = lambda: torch.load(  # noqa: E731
        list_checkpoints(inputs / "runs" / "corpora")[-1] / "training_state.pt", weights_only=True
    )["progress"]
    words = [train(inputs, "corpora")[3]["train/words"]]
    alone = state()["corpora"][0]
    records = train(inputs, "corpora", max_steps=6, train_path=[moved, second], train_weights=[1, 1])
    (one, two) = state()["corpora"]
    assert one["digest"] == alone["digest"]
    assert [mine > his for mine, his in zip(one["places"], alone["places"], strict=True)] == [True, True]
    assert sum(offset for _, offset in two["places"]) == pytest.approx(3 * 8 * 32 / 2, abs=64)
    sizes = [corpus["length"] for corpus in (one, two)]
    epochs = [
        sum(epoch + offset / size for epoch, offset in each["places"])
        for each, size in zip((one, two), sizes, strict=True)
    ]
    assert [records[6][f"train/corpus/{name}/epochs"] for name in ("moved", "valid")] == epochs
    words.append(records[6]["train/words"])
    words.append(train(inputs, "corpora", max_steps=9, train_path=[second])[9]["train/words"])
    assert state()["corpora"][1] == one, "left out, but not forgotten"
    words.append(train(inputs, "corpora", max_steps=12, train_path=[first])[12]["train/words"])
    assert state()["corpora"][0]["places"] > one["places"]
    assert (np.diff(words) > 0).all()


def test_validation_on_training_texts_is_told(inputs, capfd):
    train(inputs, "on-itself", valid_path=inputs / "train.safetensors", max_steps=1)
    assert "warning: at least 100.0% of the documents of --valid_path are in --train_path too" in capfd.readouterr().err


def test_another_content_under_the_same_name_is_told(inputs, capfd):
    """Of the same size, in the middle of the file; shortened; and a file to validate on."""
    path, valid = inputs / "same.safetensors", inputs / "same-valid.safetensors"
    with safe_open(inputs / "train.safetensors", "np") as file:
        arrays, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    shutil.copyfile(inputs / "train.safetensors", path)
    shutil.copyfile(inputs / "valid.safetensors", valid)
    words = train(inputs, "same", train_path=path, valid_path=valid)[3]["train/words"]
    assert "--train_path" not in capfd.readouterr().err
    middle = len(arrays["tokens"]) // 2
    tokens = arrays["tokens"].copy()
    tokens[middle : middle + 2] = tokens[middle + 1], tokens[middle] + 1
    save_file(arrays | {"tokens": tokens}, path, metadata=metadata)
    records = train(inputs, "same", train_path=path, valid_path=valid, max_steps=6)
    line = f"--train_path {path}: was not read before, or its content has changed; read from its beginning"
    assert line in capfd.readouterr().err.splitlines()
    assert records[6]["train/words"] == pytest.approx(2 * words, abs=2)
    offsets = arrays["document_offsets"][:-1]
    save_file({"tokens": tokens[: offsets[-1]], "document_offsets": offsets}, path, metadata=metadata)
    shutil.copyfile(inputs / "train.safetensors", valid)
    records = train(inputs, "same", train_path=path, valid_path=valid, max_steps=9)
    said = capfd.readouterr().err.splitlines()
    assert line in said
    assert f"--valid_path {valid}: has another content than before; its losses are not those of before" in said
    assert records[9]["train/words"] > 2.5 * words
    train(inputs, "same", train_path=path, valid_path=valid, max_steps=10)
    assert "has changed" not in capfd.readouterr().err


def test_corpora_that_earlier_versions_knew_by_their_ends_go_on(inputs, capfd):
    """Their digest was of the first and last 65,536 tokens; this corpus has fewer, so of all, twice."""
    train(inputs, "ends")
    (path,) = list_checkpoints(inputs / "runs" / "ends")
    state = torch.load(path / "training_state.pt", weights_only=True)
    (corpus,) = state["progress"]["corpora"]
    present = corpus["digest"]
    with safe_open(inputs / "train.safetensors", "np") as file:
        tokens, documents = file.get_tensor("tokens"), len(file.get_tensor("document_offsets")) - 1
    assert len(tokens) < 2**16
    digest = hashlib.sha256(f"{len(tokens)} {documents}".encode() + 2 * tokens.astype("<i8").tobytes())
    corpus["digest"] = digest.hexdigest()
    del state["progress"]["validated_on"]
    torch.save(state, path / "training_state.pt")
    manifest.write(path)
    train(inputs, "ends", max_steps=4)
    assert "was not read before" not in capfd.readouterr().err
    (after,) = torch.load(list_checkpoints(inputs / "runs" / "ends")[-1] / "training_state.pt", weights_only=True)[
        "progress"
    ]["corpora"]
    assert after["digest"] == present
    assert after["places"] > corpus["places"]


def test_checkpoints_of_earlier_versions_are_counted_by_their_settings(inputs, capfd):
    gone = inputs / "gone.safetensors"
    shutil.copyfile(inputs / "train.safetensors", gone)
    for name in ("earlier", "earlier, file gone"):
        train(inputs, name, train_path=gone)
        (path,) = list_checkpoints(inputs / "runs" / name)
        state = torch.load(path / "training_state.pt", weights_only=True)
        expected = state.pop("progress")
        torch.save(state, path / "training_state.pt")
        manifest.write(path)
        if name != "earlier":
            gone.unlink()
        records = train(inputs, name, global_batch_size=16, max_steps=5)
        said = capfd.readouterr().err
        assert records[4]["train/tokens"] == expected["tokens"] + 16 * 32
        if name == "earlier":
            assert records[4]["train/words"] == pytest.approx(records[4]["train/tokens"] * per_token(inputs), abs=2)
            assert "computed from its settings, as if those had always been the same" in said
        else:
            assert "train/words" not in records[4]
            assert "each corpus begins anew, and words are not known" in said
            with pytest.raises(InputError, match=r"--checkpoint_words: .* or did before its checkpoint"):
                train(inputs, name, max_steps=9, checkpoint_words=[500])


def test_a_model_card_says_what_was_trained_between_records_too(inputs):
    """Records at steps 2 and 4, a checkpoint at step 3 of another batch."""
    train(inputs, "card", max_steps=2, log_every=2)
    records = train(inputs, "card", max_steps=4, log_every=2, global_batch_size=20, checkpoint_words=[120])
    tokens = 32 * (2 * 8 + 20)
    assert records[2]["train/tokens"] < tokens < records[4]["train/tokens"]
    run_dir = inputs / "runs" / "card"
    (chosen,) = (path for path in list_checkpoints(run_dir) if path.name == "step_00000003")
    assert _facts(Origin.of(chosen))["tokens seen"] == f"{tokens:,}"
    by_words = run_dir / "words" / "chck_120"
    assert _facts(Origin.of(by_words))["tokens seen"] == f"{words_of(run_dir)['chck_120']['tokens']:,}"


def test_a_masking_history_is_of_files_in_their_order(inputs):
    one, two = inputs / "train.safetensors", inputs / "valid.safetensors"
    settings = {"mask_history": True, "train_weights": [1, 1]}
    train(inputs, "history", train_path=[one, two], **settings)
    with pytest.raises(InputError, match="counts masks of other token files than --train_path, or of these in another"):
        train(inputs, "history", train_path=[two, one], max_steps=4, **settings)
    assert 4 in train(inputs, "history", train_path=[one, two], max_steps=4, **settings)
