"""Minimal pairs scored during a run: the figures of `gptbert score`, without an effect on the run."""

import json
import os
import signal
from contextlib import nullcontext
from functools import partial

import pytest
import torch

from gptbert.checkpoint.folder import list_checkpoints
from gptbert.command_line import parse, run_command
from gptbert.config import TrainConfig
from gptbert.distributed.world import World
from gptbert.errors import StoppedError
from gptbert.model import GPTBert
from gptbert.model.objective import Objective
from gptbert.monitoring.records import read_records
from gptbert.report import render
from gptbert.score import score_pairs
from gptbert.scoring import pair_scores
from gptbert.scoring.likelihood import log_likelihoods, num_forwards
from gptbert.scoring.minimal_pairs import read_pairs
from gptbert.scoring.pair_scores import PairScores
from gptbert.scoring.trained_model import ModelChoice, TrainedModel
from gptbert.train import fit
from gptbert.trainer import Trainer
from kernels import wanted
from tests.runs import ROOT, assert_same_checkpoint, assert_same_end, flags, on_ranks, write_inputs

SETTINGS = {
    "no_compile": True, "max_steps": 6, "save_every": 3, "validate_every": 3, "validation_steps": 1, "resume": "auto",
    "score_every": 2, "ema_decay": 0.5,
}  # fmt: skip
WORDS = ("the", "name", "value", "statement", "of", "a file", "is", "returns", "<mask>", "expressions")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = write_inputs(tmp_path_factory.mktemp("pairs"), train_characters=20_000)
    lines = []
    for number in range(15):
        words = [WORDS[number * step % len(WORDS)] for step in range(1, 2 + number)]
        good, bad = " ".join(words), " ".join(reversed(words))
        lines.append({"sentence_good": good, "sentence_bad": bad, "UID": "short" if number < 5 else "long"})
    (folder / "pairs").mkdir()
    (folder / "pairs/a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def run(inputs, name, **changes):
    fit(parse(TrainConfig, flags(inputs, name=name, **SETTINGS | {"pairs_path": inputs / "pairs"} | changes)))
    return inputs / "runs" / name


@pytest.fixture(scope="module")
def scored(inputs):
    return run(inputs, "scored")


def scores(run_dir):
    found = {}
    for record in read_records(run_dir / "metrics.jsonl"):
        if any(name.startswith("pairs/") for name in record):
            assert record["step"] not in found, "once"
            found[record.pop("step")] = record
    return found


def test_records_are_what_score_says_of_the_average(inputs, scored):
    assert [*scores(scored)] == [2, 4, 6]
    trained = TrainedModel.load(ModelChoice(run=scored))
    pairs = read_pairs([inputs / "pairs"])
    results = score_pairs(trained, pairs)
    expected = {
        "pairs/clm/accuracy": results["causal"].accuracies[0].macro["UID"],
        "pairs/mlm/accuracy": results["mntp"].accuracies[0].macro["UID"],
    }
    assert scores(scored)[6] == expected
    assert len(set(expected.values())) == 2, "or the objectives may be mixed up"
    names = {name for record in read_records(scored / "metrics.jsonl") for name in record if name.startswith("pairs/")}
    assert names == set(expected)
    assert "Minimal pairs (%)" in render(scored)
    assert "`pairs/{mlm,clm}/accuracy`" in (ROOT / "docs/metrics.md").read_text()


def test_the_run_is_the_same_without_them(inputs, scored):
    without = run(inputs, "without", pairs_path=False)
    assert_same_checkpoint(*(list_checkpoints(path)[-1] for path in (scored, without)))
    losses = [
        [record["train/loss"] for record in read_records(path / "metrics.jsonl") if "train/loss" in record]
        for path in (scored, without)
    ]
    assert losses[0] == losses[1]


def test_nothing_is_compiled_for_the_many_lengths(inputs, scored, monkeypatch):
    def refuse(*_):
        pytest.fail("compiled")

    seen = set()
    encode, is_fused = GPTBert.encode, partial(wanted.is_wanted, "attention_context")
    monkeypatch.setattr(GPTBert, "encode", lambda *args: (seen.add(is_fused()), encode(*args))[1])
    wanted.use_fused(wanted.FUSED)

    trained = TrainedModel.load(ModelChoice(run=scored))
    for block in trained.model.blocks:
        block.is_compiled = True
        block.attention.compile(fullgraph=True, dynamic=False, backend=refuse)
    config = parse(TrainConfig, flags(inputs, pairs_path=inputs / "pairs"))
    pairs = PairScores(config, World(0, 1, torch.device("cpu")))
    assert pairs.record(trained.model, nullcontext()) == scores(scored)[6]
    assert seen == {False}
    assert wanted.is_wanted("attention_context")


@pytest.mark.parametrize(("numerator", "objectives"), [(0, {"clm"}), (4, {"mlm"})])
def test_only_what_is_trained_is_scored(inputs, numerator, objectives):
    config = parse(TrainConfig, flags(inputs, hybrid_numerator=numerator, pairs_path=inputs / "pairs"))
    assert {
        objective.value for objective in PairScores(config, World(0, 1, torch.device("cpu"))).objectives
    } == objectives


@pytest.mark.parametrize(("step", "at"), [(2, 1), (6, 2)])
def test_a_signal_ends_the_run_within_the_scores(inputs, scored, monkeypatch, step, at):
    """At step 2 no checkpoint is due; at step 6 the validation has been recorded."""
    name, forwards, here = f"signal {step}", [], []
    encode, score = pair_scores.log_likelihoods, Trainer.score_pairs

    def watched(*args, advance, **options):
        def sending(count):
            forwards.append(count)
            if here == [step] and len(forwards) == at:
                os.kill(os.getpid(), signal.SIGTERM)
            advance(count)

        return encode(*args, advance=sending, **options)

    def noted(self, *others):
        here[:], forwards[:] = [self.step], []
        score(self, *others)

    with monkeypatch.context() as patch:
        patch.setattr(pair_scores, "log_likelihoods", watched)
        patch.setattr(pair_scores, "BATCH_TOKENS", 256)
        patch.setattr(Trainer, "score_pairs", noted)
        with pytest.raises(StoppedError, match=f"stopped by SIGTERM after step {step}, with a checkpoint in"):
            run(inputs, name)
    assert len(forwards) == at, "none after the one in which the signal came"
    run_dir = inputs / "runs" / name
    assert step not in scores(run_dir)
    run(inputs, name)
    assert_same_end(run_dir, scored)


class Killed(BaseException):
    pass


def test_scores_that_a_kill_ended_are_made_up(inputs, scored, monkeypatch):
    def die(self, *others):
        if self.step == 6:
            raise Killed
        record(self, *others)

    record = Trainer.score_pairs
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "score_pairs", die)
        with pytest.raises(Killed):
            run(inputs, "killed")
    assert [*scores(inputs / "runs/killed")] == [2, 4]
    assert_same_end(run(inputs, "killed"), scored)
    assert_same_end(run(inputs, "killed"), scored)


@pytest.mark.parametrize("batch_tokens", [1, 100, 8192])
@pytest.mark.parametrize("objective", list(Objective))
def test_forwards_are_counted_beforehand(scored, objective, batch_tokens):
    model, done = TrainedModel.load(ModelChoice(run=scored)).model, []
    sentences = [[1, *range(10, 10 + length)] for length in (0, 3, 3, 9, 1, 30)]
    log_likelihoods(model, sentences, objective, batch_tokens=batch_tokens, advance=done.append)
    assert len(done) == num_forwards(sentences, objective, batch_tokens)


def scoring_rank(rank, arguments, results):
    """Trains; the ranks' sentences are of different lengths, and so take different numbers of forwards."""
    interruptible, forwards = Trainer._interruptible, []

    def counted(self, show):
        forwards.clear()
        return interruptible(self, lambda count: forwards.append(count) or show(count))

    Trainer._interruptible, pair_scores.BATCH_TOKENS = counted, 256
    fit(parse(TrainConfig, arguments))
    results.put((rank, forwards))


def test_ranks_share_the_pairs(inputs):
    """Sharded: each forward gathers weights from all ranks, so that one more or less would hang."""
    settings = {**SETTINGS, "parallel": "fsdp", "hybrid_mode": "batch", "max_steps": 2, "validate_every": 0}
    forwards = on_ranks(2, scoring_rank, flags(inputs, name="ranks", pairs_path=inputs / "pairs", **settings))
    assert len(forwards[0]) == len(forwards[1])
    assert 0 in forwards[0], "or both ranks have as much to do"
    trained = TrainedModel.load(ModelChoice(run=inputs / "runs/ranks"))
    results = score_pairs(trained, read_pairs([inputs / "pairs"]))
    (record,) = scores(inputs / "runs/ranks").values()
    assert record["pairs/clm/accuracy"] == results["causal"].accuracies[0].macro["UID"]
    assert record["pairs/mlm/accuracy"] == results["mntp"].accuracies[0].macro["UID"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"sentence_good": "A."}', "--pairs_path: {}:1: the object has no `sentence_bad`"),
        (None, "--pairs_path: {}: no such file or folder"),
        (
            '{"sentence_good": "\\u4e00\\u4e01", "sentence_bad": "\\u4e02"}',
            "--pairs_path: 100% of its tokens are unknown",
        ),
    ],
)
def test_bad_pairs_are_one_line_before_anything_is_written(inputs, tmp_path, capfd, monkeypatch, line, message):
    file = tmp_path / "pairs.jsonl"
    if line:
        file.write_text(line + "\n")
    if "unknown" in message:
        monkeypatch.setattr(pair_scores, "unknown_share", lambda *_: 1.0)
    with pytest.raises(SystemExit):
        run_command(TrainConfig, fit, flags(inputs, name="bad", **SETTINGS | {"pairs_path": file}))
    assert capfd.readouterr().err.splitlines()[-1].startswith(f"error: {message.format(file)}")
    assert not (inputs / "runs/bad").exists()
