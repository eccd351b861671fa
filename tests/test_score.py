"""Minimal pairs: reading files, accuracy by group, and the command on a run's checkpoint."""

import gzip
import json
import math

import numpy as np
import pytest

from gptbert.command_line import parse, run_command
from gptbert.config import TrainConfig
from gptbert.errors import InputError
from gptbert.model.objective import Objective
from gptbert.score import SWEEP, BackendScores, ScoreSettings, score
from gptbert.scoring.closing import repeated_share, repeats_line, ties_line
from gptbert.scoring.likelihood import log_likelihoods
from gptbert.scoring.minimal_pairs import Accuracy, MinimalPair, read_pairs
from gptbert.scoring.trained_model import ModelChoice, TrainedModel
from gptbert.text.encoding import encode_sentences
from gptbert.text.special_tokens import BOS_ID, MASK_ID
from gptbert.train import fit
from tests.runs import flags, write_inputs

PAIRS = [
    ("This is the name of a file.", "This is the name of a of.", "noun", "a"),
    ("The statement is executed.", "The statement are executed.", "agreement", "a"),
    ("It returns a value.", "It return a value.", "agreement", "b"),
    ("The same <mask> twice.", "The same <mask> twice.", "agreement", "b"),
]


def write_pairs(path, pairs=PAIRS, **changes):
    lines = [
        {"sentence_good": good, "sentence_bad": bad, "UID": uid, "field": field, "pairID": 7} | changes
        for good, bad, uid, field in pairs
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = write_inputs(tmp_path_factory.mktemp("score"), train_characters=10_000)
    fit(parse(TrainConfig, flags(folder, name="run", max_steps=3)))
    return folder / "runs/run"


@pytest.fixture(scope="module")
def trained(run_dir):
    return TrainedModel.load(ModelChoice(run=run_dir))


def test_accuracies_by_hand():
    """Three of five are right; a tie or a lower score is wrong."""
    uids, fields = "xxyyz", "pqqqq"
    pairs = [MinimalPair("", "", {"UID": u, "field": f}, None, 1) for u, f in zip(uids, fields, strict=True)]
    good, bad = np.array([-1.0, -2.0, -3.0, -4.0, -5.0]), np.array([-2.0, -2.0, -4.0, -3.0, -6.0])
    accuracy = Accuracy.of(pairs, good, bad)
    assert accuracy.micro == 3 / 5
    assert accuracy.groups == {"UID": {"x": 0.5, "y": 0.5, "z": 1.0}, "field": {"p": 1.0, "q": 0.5}}
    assert accuracy.macro == {"UID": pytest.approx(2 / 3), "field": 0.75}
    assert accuracy.headline == accuracy.macro["UID"]


def test_the_best_temperature_is_of_equals_the_nearest_to_one():
    same, better = Accuracy(0.5, {}), Accuracy(0.6, {})
    temperatures = [0.5, 0.9, 1.2, 3.0]
    assert BackendScores(temperatures, None, None, [same] * 4).best == 1
    assert BackendScores(temperatures, None, None, [better, same, same, better]).best == 0
    by_group = [Accuracy(0.5, {"UID": {"x": 0.2, "y": 0.6}}), Accuracy(0.4, {"UID": {"x": 0.8, "y": 0.3}})]
    assert BackendScores([1.0, 2.0], None, None, by_group).best == 1, "the mean over groups decides"


def test_files_and_folders_are_read_once_and_in_order(tmp_path):
    (tmp_path / "sub").mkdir()
    write_pairs(tmp_path / "b.jsonl", PAIRS[:1])
    (tmp_path / "sub/c.jsonl.gz").write_bytes(gzip.compress(write_pairs(tmp_path / "x", PAIRS[1:]).read_bytes()))
    (tmp_path / "notes.txt").write_text("no pairs")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    write_pairs(tmp_path / ".ipynb_checkpoints/b-checkpoint.jsonl", PAIRS[:1])
    (tmp_path / "sub/._c.jsonl").write_bytes(b"\0\5\x16\7")
    pairs = read_pairs([tmp_path, tmp_path / "b.jsonl"])
    assert [pair.groups for pair in pairs] == [{"UID": uid} for _, _, uid, _ in PAIRS]
    assert [pair.line for pair in pairs] == [1, 1, 2, 3]
    assert pairs[2].good == "It returns a value."
    by_number = read_pairs([tmp_path / "b.jsonl"], ["field", "pairID", "field"])
    assert by_number[0].groups == {"field": "a", "pairID": "7"}


def test_without_a_uid_everywhere_there_are_no_groups(tmp_path):
    file = write_pairs(tmp_path / "a.jsonl")
    file.write_text(file.read_text() + '{"sentence_good": "A.", "sentence_bad": "B."}\n')
    assert {len(pair.groups) for pair in read_pairs([file])} == {0}
    with pytest.raises(InputError, match=r"a.jsonl:5: the object has no `UID`"):
        read_pairs([file], ["UID"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", "is no object with `sentence_good`"),
        ('{"sentence_good": "A."}', "the object has no `sentence_bad`"),
        ('{"sentence_good": 3, "sentence_bad": "B."}', "`sentence_good` is a number, not a string"),
        ('{"sentence_good": " ", "sentence_bad": "B."}', "`sentence_good` is empty"),
        ('{"sentence_good": "A.", "sentence_bad": "B.", "UID": ["x"]}', "`UID` is an array"),
        ("{", "not JSON (Expecting property name enclosed in double quotes at column 2); expected an object with `sen"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    file = write_pairs(tmp_path / "a.jsonl", PAIRS[:2])
    file.write_text(file.read_text() + "\n" + line + "\n")
    with pytest.raises(InputError) as error:
        read_pairs([file])
    assert str(error.value).startswith(f"{file}:4: {message}")


def test_sentences_are_plain_text_led_by_one_start(trained):
    ids, empty = encode_sentences(trained.tokenizer, ["a <mask> <s>b", ""])
    assert ids.count(BOS_ID) == 1
    assert ids[0] == BOS_ID
    assert MASK_ID not in ids
    assert trained.tokenizer.decode(ids) == "a <mask> <s>b"
    assert empty == [BOS_ID]


def test_the_command_reports_everything(run_dir, trained, tmp_path, capsys):
    file = write_pairs(tmp_path / "a.jsonl")
    output, lines = tmp_path / "results.json", tmp_path / "scores.jsonl"
    arguments = {"run": run_dir, "pairs": (file,), "group_by": ("UID", "field"), "temperature": (1.0, 2.65)}
    score(ScoreSettings(**arguments, output=output, pairs_output=lines))
    results = json.loads(output.read_text())
    assert results["num_pairs"] == 4
    assert results["num_pairs_by_group"] == {"UID": {"noun": 1, "agreement": 3}, "field": {"a": 2, "b": 2}}
    written = [json.loads(line) for line in lines.read_text().splitlines()]
    for backend, objective in (("causal", Objective.CLM), ("mntp", Objective.MLM)):
        scores = results["backends"][backend]
        best = scores["best_temperature"]
        for good_or_bad, column in (("good", 0), ("bad", 1)):
            ids = encode_sentences(trained.tokenizer, [pair[column] for pair in PAIRS])
            expected = log_likelihoods(trained.model, ids, objective, [best]).squeeze(1).tolist()
            assert [line[backend][good_or_bad] for line in written] == pytest.approx(expected, abs=1e-4)
        correct = [line[backend]["good"] > line[backend]["bad"] for line in written]
        assert correct == [line[backend]["correct"] for line in written]
        assert not correct[3], "equal sentences are a tie, and a tie is wrong"
        assert [each["temperature"] for each in scores["temperatures"]] == [1.0, 2.65]
        at_best = scores["temperatures"][[1.0, 2.65].index(best)]
        assert at_best["micro"] == sum(correct) / 4
        assert at_best["groups"]["UID"] == {"noun": float(correct[0]), "agreement": sum(correct[1:]) / 3}
        assert at_best["macro"]["UID"] == max(each["macro"]["UID"] for each in scores["temperatures"])
    assert (written[2]["line"], written[2]["UID"], written[2]["sentence_bad"]) == (3, "agreement", "It return a value.")
    screen = capsys.readouterr().out
    for text in ("noun", "mean over UID (BLiMP's number)", "mean over field", "all 4 pairs", "at temperature"):
        assert text in screen


def test_a_sweep_gives_what_separate_runs_give(run_dir, tmp_path):
    file, swept, alone = write_pairs(tmp_path / "a.jsonl"), tmp_path / "swept.json", tmp_path / "alone.json"
    score(ScoreSettings(run=run_dir, pairs=(file,), sweep=True, temperature=(4.0,), output=swept))
    results = json.loads(swept.read_text())["backends"]
    temperatures = [each["temperature"] for each in results["mntp"]["temperatures"]]
    assert temperatures == [*SWEEP, 4.0]
    assert (SWEEP[0], SWEEP[-1], len(SWEEP)) == (0.5, 3.0, 51)
    for temperature in (0.5, 2.65):
        score(ScoreSettings(run=run_dir, pairs=(file,), temperature=(temperature,), output=alone))
        for backend, separate in json.loads(alone.read_text())["backends"].items():
            assert separate["temperatures"] == [results[backend]["temperatures"][temperatures.index(temperature)]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "0"], "--temperature is 0.0"),
        (["--temperature", "1", "nan"], "--temperature is nan"),
        (["--temperature"], "--temperature"),
        (["--backend", "mlm"], "--backend"),
        (["--backend"], "--backend"),
        (["--batch_tokens", "0"], "--batch_tokens is 0"),
        (
            ["--group_by", "genre"],
            "`genre`, only `sentence_good`, `sentence_bad`, `UID`, `field`, `pairID` (--group_by names others)",
        ),
        (["--output", "{}/a.jsonl"], "is also an input"),
        (["--output", "{}"], "is a folder"),
        (["--output", "{}/a.jsonl/x.json"], "cannot be written"),
        (["--output", "{}/x", "--pairs_output", "{}/x"], "name two files"),
        (["--device", "gpu"], "--device"),
    ],
)
def test_a_mistake_is_one_line(run_dir, tmp_path, capfd, arguments, message):
    file = write_pairs(tmp_path / "a.jsonl")
    with pytest.raises(SystemExit) as end:
        run_command(ScoreSettings, score, [str(run_dir), str(file), *(each.format(tmp_path) for each in arguments)])
    assert end.value.code in {1, 2}
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert list(tmp_path.iterdir()) == [file], "nothing is written"


@pytest.mark.parametrize("damage", ["no run", "no tokenizer", "weights"])
def test_a_checkpoint_that_cannot_be_used_is_one_line(run_dir, tmp_path, damage):
    (newest,) = (run_dir / "checkpoints").iterdir()
    copy = tmp_path / "copy"
    copy.mkdir()
    if damage != "no run":
        for file in newest.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
    if damage == "no tokenizer":
        (copy / "tokenizer.json").unlink()
    if damage == "weights":
        (copy / "ema.safetensors").write_bytes((copy / "ema.safetensors").read_bytes()[:-1])
    with pytest.raises(InputError, match=r"neither a checkpoint|has no tokenizer.json; copy|is damaged"):
        TrainedModel.load(ModelChoice(run=copy))
    if damage == "weights":
        TrainedModel.load(ModelChoice(run=copy, weights="model"))


def test_the_figures_at_the_end_show_ties_and_unknown_tokens(run_dir, tmp_path, capsys):
    write_pairs(tmp_path / "pairs.jsonl")
    output = tmp_path / "scores.json"
    score(ScoreSettings(run=run_dir, pairs=(tmp_path / "pairs.jsonl",), output=output, backend=("causal",)))
    assert capsys.readouterr().out.splitlines()[-1] == (
        "0.0% unknown tokens; 0.0% repeated pairs; WARNING: 25.0% ties (causal)"
    )
    report = json.loads(output.read_text())
    assert (report["unknown_tokens"], report["repeated_pairs"], report["backends"]["causal"]["ties"]) == (0, 0, 0.25)
    same = [{"sentence_good": "Same.", "sentence_bad": "Same."}] * 3
    (tmp_path / "same.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in same))
    with pytest.raises(InputError, match=r"--backend causal: both sentences score the same in every pair"):
        score(ScoreSettings(run=run_dir, pairs=(tmp_path / "same.jsonl",), output=tmp_path / "no.json"))
    assert not (tmp_path / "no.json").exists()


def test_a_pair_the_other_way_round_is_the_same_pair():
    assert repeated_share([("a", "b"), ("b", "a"), ("a", "b"), ("a", "c")]) == 0.5
    assert [repeats_line(share) for share in (0.05, 0.5)] == ["5.0% repeated pairs", "WARNING: 50.0% repeated pairs"]


@pytest.mark.parametrize(
    ("good", "bad", "said"),
    [
        ([1.0, 2.0], [0.0, 1.0], "0.0% ties (x)"),
        ([1.0, 2.0], [0.0, 2.0], "WARNING: 50.0% ties (x)"),
        ([1.0], [1.0], "WARNING: 100.0% ties (x)"),
        ([1.0, 1.0], [1.0, 1.0], None),
        ([1.0, math.nan], [0.0, 1.0], None),
        ([1.0, 2.0], [0.0, -math.inf], None),
    ],
)
def test_ties(good, bad, said):
    if said is None:
        with pytest.raises(InputError, match="--backend x: "):
            ties_line(np.array(good), np.array(bad), "x")
    else:
        assert ties_line(np.array(good), np.array(bad), "x") == said
