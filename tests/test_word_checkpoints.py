"""Checkpoints by words seen: at the right step, with the right name, once, and unaffected by kills."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import torch

from gptbert.checkpoint import manifest
from gptbert.checkpoint.folder import list_checkpoints, list_word_checkpoints
from gptbert.checkpoint.resume import find
from gptbert.checkpoint.saved_model import load_model
from gptbert.checkpoint.word_checkpoints import BABYLM, WordCheckpoints, checkpoint_name
from gptbert.command_line import parse
from gptbert.config import TrainConfig
from gptbert.data.hybrid_plan import HybridPlan
from gptbert.data.inputs import Inputs
from gptbert.data.packing import Position, RowStream
from gptbert.data.progress import Progress
from gptbert.data.token_store import TokenStore, TokenStoreWriter
from gptbert.errors import InputError
from gptbert.monitoring.records import read_records
from gptbert.text.tokenizer import tokenizer_hash
from gptbert.train import fit
from gptbert.trainer import Trainer
from tests.runs import Ranks, assert_same_end, flags, train, wait_for_record, write_inputs

FILES = {
    "model.safetensors", "ema.safetensors", "model_config.json", "train_config.json", "tokenizer.json", "words.json",
    "manifest.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("words"))


def words_of(store, num_words, config, tiny):
    inputs = Inputs(tiny, 64, (dataclasses.replace(store, num_words=num_words),), store)
    return WordCheckpoints(config, Progress(config, inputs, HybridPlan(config, 1)))


# Which step


def test_words_of_a_place_by_hand():
    """Documents of 9 and 5 tokens, each followed by an `<s>`: 16 positions, 4 slots of 4, 10 words."""
    assert [Position(slot // 4, 4 * (slot % 4)).words(10, 16) for slot in range(9)] == [0, 2, 5, 7, 10, 12, 15, 17, 20]
    for num_words in (1, 7, 10**15 + 1):
        assert [Position(epoch).words(num_words, 16) for epoch in (1, 3, 10**6)] == [
            num_words * n for n in (1, 3, 10**6)
        ]


def test_a_threshold_is_due_once_at_the_first_step_that_reaches_it(make_store, make_config, tiny):
    """4 rows per step, 1 masked and 3 causal: a step sees 2.5 and 7.5 of 10 words, each rounded down."""
    config = make_config(
        seq_length=4, max_steps=4, global_batch_size=4, batch_reduction=1, checkpoint_words=("9", "19", "20", "27", "3")
    )
    words = words_of(make_store([9, 5]), 10, config, tiny)
    assert [words._progress.words_before(step) for step in range(5)] == [0, 2 + 7, 5 + 15, 7 + 22, 40]
    assert [words.due(step) for step in range(1, 5)] == [[3, 9], [19, 20], [27], []]
    nothing = words_of(make_store([9, 5]), 10, dataclasses.replace(config, checkpoint_words=()), tiny)
    assert nothing.due(1) == []


def test_babylm_goes_as_far_as_the_run(make_store, make_config, tiny):
    config = make_config(
        seq_length=4, max_steps=10, global_batch_size=4, batch_reduction=1, checkpoint_words=("babylm",)
    )
    words = words_of(make_store([9, 5]), 21_000_000, config, tiny)
    assert list(map(checkpoint_name, words.thresholds)) == [
        *(f"chck_{n}M" for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 200))
    ]
    assert [reached for step in range(1, 11) for reached in words.due(step)] == words.thresholds
    assert "of the 210,000,000 words that the run sees: chck_1M" in words.forecast()
    assert [checkpoint_name(n) for n in (BABYLM[-1], 500_000, 1_500_000, 1_000_500, 7)] == [
        "chck_1000M", "chck_500K", "chck_1500K", "chck_1000500", "chck_7"
    ]  # fmt: skip
    assert len(BABYLM) == 28
    assert words_of(make_store([9, 5]), 1000, config, tiny).thresholds == []


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (("500_000", "1M", "1.5m", "20k", "BabyLM"), [20_000, 500_000, *(10**6 * n for n in (1, 1.5, 2, 3))]),
        (("1M", "1_000K", "1000000"), [10**6]),
        (("0",), "--checkpoint_words 0: expected babylm, or numbers of words"),
        (("1.5",), "--checkpoint_words 1.5: expected"),
        (("-1M",), "--checkpoint_words -1M: expected"),
        (("1T",), "--checkpoint_words 1T: expected"),
        (("M",), "--checkpoint_words M: expected"),
        (("",), "--checkpoint_words : expected"),
        (("٣",), "expected"),
        (("1M", "4M"), "--checkpoint_words 4M: the run sees 3,000,000 words in --max_steps 4"),
    ],
)
def test_checkpoint_words_become_thresholds_or_are_refused(make_store, make_config, tiny, values, expected):
    config = make_config(seq_length=4, max_steps=4, global_batch_size=4, batch_reduction=1, checkpoint_words=values)
    if isinstance(expected, list):
        assert words_of(make_store([9, 5]), 750_000, config, tiny).thresholds == expected
        return
    with pytest.raises(InputError, match=re.escape(expected)):
        words_of(make_store([9, 5]), 750_000, config, tiny)


# Whole runs


def run(inputs, name, *thresholds, **settings):
    settings = {"max_steps": 12, "validation_steps": 1, "save_every": 4, **settings}
    fit(parse(TrainConfig, [*flags(inputs, name=name, **settings), "--checkpoint_words", *thresholds]))
    return inputs / "runs" / name


def folders(run_dir):
    """Content of every file in the word checkpoints, except settings and manifests, which contain the run's name."""
    return {
        path.relative_to(run_dir).as_posix(): path.read_bytes()
        for path in (run_dir / "words").rglob("*")
        if path.is_file() and path.name not in {"train_config.json", "manifest.json"}
    }


def test_a_run_saves_the_weights_of_the_step_for_good(inputs):
    run_dir = run(inputs, "by-words", "200", "0.5K", "501", save_every=1, keep_checkpoints=12)
    num_words = TokenStore.open(inputs / "train.safetensors").num_words
    assert num_words == sum(len(json.loads(line).split()) for line in (inputs / "train.jsonl").open())
    records = {record["step"]: record for record in read_records(run_dir / "metrics.jsonl") if "train/loss" in record}
    # 32 tokens per row, and an epoch has every word of the file
    epoch_tokens = 32 * RowStream(TokenStore.open(inputs / "train.safetensors"), 32).slots_per_epoch
    for record in records.values():
        assert record["train/words"] == pytest.approx(record["train/tokens"] / epoch_tokens * num_words, abs=2)
    for name, threshold in (("chck_200", 200), ("chck_500", 500), ("chck_501", 501)):
        folder = run_dir / "words" / name
        assert {path.name for path in folder.iterdir()} == FILES
        manifest.check(folder)
        said = json.loads((folder / "words.json").read_text())
        step = next(step for step, record in records.items() if record["train/words"] >= threshold)
        assert said == {"step": step} | {name: records[step][f"train/{name}"] for name in ("words", "tokens")}
        saved = run_dir / "checkpoints" / f"step_{step:08d}"
        for weights in ("model", "ema"):
            ours, theirs = (load_model(path, weights).state_dict() for path in (folder, saved))
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
            assert (folder / f"{weights}.safetensors").read_bytes() == (saved / f"{weights}.safetensors").read_bytes()
    assert [path.name for path in list_word_checkpoints(run_dir)] == ["chck_200", "chck_500", "chck_501"]
    settings = json.loads((folder / "train_config.json").read_text())
    assert settings["checkpoint_words"] == ["200", "0.5K", "501"]
    few = run(inputs, "few", "200", "0.5K", save_every=1, keep_checkpoints=1)
    assert len(list_checkpoints(few)) == 1
    assert len(list_word_checkpoints(few)) == 2, "retention leaves them alone"


@pytest.fixture(scope="module")
def plain(inputs):
    """An uninterrupted run that reaches a threshold at step 8, where a checkpoint is due too."""
    run_dir = run(inputs, "plain", "200", "0.5K")
    assert json.loads((run_dir / "words" / "chck_500" / "words.json").read_text())["step"] == 8
    return run_dir


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", ["in the folder", "before the checkpoint of the same step", "of a later step"])
def test_a_run_that_was_killed_has_each_of_them_once_and_the_same(inputs, plain, monkeypatch, moment):
    name = f"killed {moment}"

    def die(*args, **options):
        raise Killed

    save, train_step = Trainer.save, Trainer.train_step
    with monkeypatch.context() as patch:
        if moment == "in the folder":
            patch.setattr("gptbert.io.files.fsync_folder", lambda path: "chck_500" in path.name and die())
        elif moment == "of a later step":
            patch.setattr(
                Trainer, "train_step", lambda self, rows: die() if self.step == 11 else train_step(self, rows)
            )
            patch.setattr(Trainer, "save", lambda self: self.step == 8 or save(self))
        else:
            patch.setattr(Trainer, "save", lambda self: die() if self.step == 8 else save(self))
        with pytest.raises(Killed):
            run(inputs, name, "200", "0.5K", resume="auto")
    killed = inputs / "runs" / name
    assert [path.name for path in list_checkpoints(killed)] == ["step_00000004"]
    assert (killed / "words" / "chck_500").is_dir() == (moment != "in the folder")
    (killed / "words" / ".chck_500.incomplete").mkdir(exist_ok=True)  # as left by SIGKILL, which runs no `finally`
    (killed / "words" / ".chck_500.deleted").mkdir()
    run(inputs, name, "200", "0.5K", resume="auto")
    assert folders(killed) == folders(plain)
    assert sorted(path.name for path in (killed / "words").iterdir()) == ["chck_200", "chck_500"]
    assert_same_end(plain, killed)


def test_a_folder_of_a_course_that_the_run_left_is_set_aside(inputs, plain, capfd):
    """Killed after step 8 and before its checkpoint, and resumed without the threshold that was reached there."""
    run_dir = shutil.copytree(plain, inputs / "runs" / "set-aside")
    for path in list_checkpoints(run_dir)[1:]:
        shutil.rmtree(path)
    assert [path.name for path in list_checkpoints(run_dir)] == ["step_00000004"]
    run(inputs, "set-aside", "200", resume="auto")
    assert sorted(path.name for path in (run_dir / "words").iterdir()) == ["chck_200", "left_chck_500"]
    assert [path.name for path in list_word_checkpoints(run_dir)] == ["chck_200"]
    line = f"{run_dir}/words/chck_500: of step 8, after the one that this run goes on from; now left_chck_500"
    assert line in capfd.readouterr().err.splitlines()


def test_two_sharded_ranks_killed_and_resumed(inputs):
    settings = {
        "parallel": "fsdp",
        "hybrid_mode": "batch",
        "max_steps": 20,
        "save_every": 15,
        "checkpoint_words": "500",
    }
    ranks = Ranks(flags(inputs, name="sharded", **settings), 2, inputs / "sharded.log")
    run_dir = inputs / "runs" / "sharded"
    wait_for_record(ranks, run_dir, 11)  # one record per step; the threshold is reached at step 8
    ranks.kill()
    assert not list_checkpoints(run_dir), "killed too late to show anything"
    (folder,) = list_word_checkpoints(run_dir)
    before, written = folders(run_dir), folder.stat().st_mtime_ns
    weights = [load_model(folder, weights).state_dict() for weights in ("model", "ema")]
    assert not torch.equal(*(each["head.dense.weight"] for each in weights))
    train(inputs, run_dir.name, 2, **settings, resume="auto")
    assert folder.stat().st_mtime_ns > written
    assert folders(run_dir) == before
    assert len(before) == 5


def test_left_over_folders_are_as_good_as_checkpoints(inputs, make_config):
    other = run(inputs, "whole", "200", max_steps=4)
    config = make_config(output_dir=inputs / "runs", name="left")
    shutil.copytree(other / "words", config.run_dir / "words")
    with pytest.raises(InputError, match=r"left already holds checkpoints; go on with --resume auto"):
        find(config)
    with pytest.raises(InputError, match=r"while the run 'left' already has chck_200: give another --name"):
        find(dataclasses.replace(config, resume=str(list_checkpoints(other)[0])))
    assert find(dataclasses.replace(config, resume="auto")) is None, "a run killed before its first checkpoint"


def test_token_files_of_before_train_but_know_no_words(inputs):
    store, old = TokenStore.open(inputs / "train.safetensors"), inputs / "old.safetensors"
    with TokenStoreWriter(old, 320, tokenizer_hash(inputs / "tokenizer.json")) as writer:
        writer.append(np.concatenate(store.shards), store.documents()[1])
    with pytest.raises(InputError, match=r"--checkpoint_words: .* how many words it holds; tokenize the corpus again"):
        run(inputs, "old", "500", train_path=old)
    assert not (inputs / "runs" / "old").exists()
    fit(parse(TrainConfig, flags(inputs, name="old", train_path=old, max_steps=2, validation_steps=1)))
    assert not any("train/words" in record for record in read_records(inputs / "runs" / "old" / "metrics.jsonl"))
