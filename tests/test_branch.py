"""`--branch_from`: one stable run, several endings, whose learning rate falls from what it was to 0."""

import dataclasses
import json
import re
import shutil

import pytest

from gptbert.checkpoint.branch import settings_of_branch
from gptbert.checkpoint.folder import list_checkpoints
from gptbert.checkpoint.resume import find
from gptbert.command_line import parse
from gptbert.config import TrainConfig
from gptbert.errors import InputError
from gptbert.monitoring.records import read_records
from gptbert.schedules import learning_rate
from gptbert.train import fit
from tests.runs import assert_same_end, flags, write_inputs

STABLE = {
    "schedule": "constant", "max_steps": 100, "warmup_proportion": 0.02, "learning_rate": 4e-3, "no_compile": True,
    "log_every": 1, "validation_steps": 1, "validate_every": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("branch"))


@pytest.fixture(scope="module")
def stable(inputs):
    """The first 6 steps of a stable run, with checkpoints after 3, 4 and 6."""
    settings = {**STABLE, "max_steps": 6, "warmup_proportion": 2 / 6, "save_every": 2, "keep_checkpoints": 1}
    settings["save_steps"] = [3, 4]
    fit(parse(TrainConfig, flags(inputs, name="stable", **settings)))
    return inputs / "runs" / "stable"


def at(run_dir, step):
    return run_dir / "checkpoints" / f"step_{step:08d}"


def config(inputs, name="branch", **changes):
    return parse(TrainConfig, flags(inputs, name=name, **{**STABLE, "max_steps": 9, **changes}))


def branched(config):
    """The branch's settings, and the line about it."""
    settings, line = settings_of_branch(config)
    return dataclasses.replace(config, **settings), line


def rates(run_dir):
    records = read_records(run_dir / "metrics.jsonl")
    return [record["train/learning_rate"] for record in records if "train/learning_rate" in record]


def test_listed_checkpoints_are_kept(stable):
    assert list_checkpoints(stable) == [at(stable, step) for step in (3, 4, 6)]


def test_two_endings_of_one_run(inputs, stable):
    assert rates(stable) == pytest.approx([0, 2e-3, 4e-3, 4e-3, 4e-3, 4e-3])
    for start, end in ((3, 7), (6, 9)):
        name = f"ending-{start}"
        fit(config(inputs, name, branch_from=at(stable, start), max_steps=end, resume="auto"))
        falls = [4e-3 * (end - step) / (end - start) for step in range(start, end)]
        assert rates(inputs / "runs" / name) == pytest.approx(falls)
    fit(config(inputs, "of-the-run", branch_from=stable))
    assert_same_end(inputs / "runs" / "of-the-run", inputs / "runs" / "ending-6")
    again = parse(TrainConfig, [f"--run_file={inputs / 'runs' / 'of-the-run' / 'run.yaml'}", "--name=again"])
    assert branched(again) == branched(config(inputs, "again", branch_from=stable, n_special_tokens=16))


def test_a_branch_that_was_stopped_goes_on_as_it_began(inputs, stable, tmp_path):
    gone = shutil.copytree(at(stable, 3), tmp_path / "step_00000003")
    changes = {"branch_from": gone, "max_steps": 7, "resume": "auto", "save_every": 1, "keep_checkpoints": 9}
    fit(config(inputs, "whole", **changes))
    run_dir = inputs / "runs" / "halved"
    shutil.copytree(inputs / "runs" / "whole", run_dir)
    for step in (6, 7):
        shutil.rmtree(at(run_dir, step))
    shutil.rmtree(gone)
    fit(config(inputs, "halved", **changes))
    assert_same_end(run_dir, inputs / "runs" / "whole")
    longer, line = branched(config(inputs, "halved", **changes | {"max_steps": 11}))
    assert [learning_rate(longer, step) for step in (3, 7, 11)] == pytest.approx([4e-3, 2e-3, 0])
    assert line == "a branch from step 3: the learning rate falls from 0.004 there to 0 at step 11"


def test_settings_that_a_crash_damaged_are_not_those_of_the_branch(inputs, stable):
    changes = {"branch_from": at(stable, 3), "max_steps": 6, "resume": "auto", "save_every": 1, "keep_checkpoints": 9}
    fit(config(inputs, "crashed", **changes))
    run_dir = inputs / "runs" / "crashed"
    (at(run_dir, 6) / "train_config.json").write_text("")
    saved = json.loads((at(run_dir, 5) / "train_config.json").read_text())
    (at(run_dir, 5) / "train_config.json").write_text(json.dumps(saved | {"learning_rate": 1.0}))
    fit(config(inputs, "crashed", **changes))
    assert rates(run_dir) == pytest.approx([4e-3, 4e-3 * 2 / 3, 4e-3 / 3])
    assert sorted(path.name for path in (run_dir / "checkpoints").glob("*.damaged")) == [
        "step_00000005.damaged", "step_00000006.damaged",
    ]  # fmt: skip
    assert [path.name for path in list_checkpoints(run_dir)] == ["step_00000004", "step_00000005", "step_00000006"]


def test_a_run_that_is_no_branch_or_another_one_is_left_alone(inputs, stable):
    asked = {"branch_from": at(stable, 3), "resume": "auto"}
    with pytest.raises(InputError, match=r"the run 'stable' has checkpoints already, and is no branch; give another"):
        branched(config(inputs, "stable", max_steps=200, **asked))
    fit(config(inputs, "later", branch_from=at(stable, 4), max_steps=6))
    with pytest.raises(InputError, match=r"'later' has checkpoints already, and is a branch from step 4; give another"):
        branched(config(inputs, "later", max_steps=6, **asked))


@pytest.mark.parametrize(
    ("schedule", "step", "peak"), [("cosine", 3, 0.55e-3), ("trapezoid", 5, 0.5e-3), ("constant", 5, 1e-3)]
)
def test_a_branch_begins_with_the_rate_that_there_was(inputs, stable, tmp_path, schedule, step, peak):
    folder = shutil.copytree(at(stable, 3), tmp_path / f"step_{step:08d}")
    saved = json.loads((folder / "train_config.json").read_text())
    saved |= {"schedule": schedule, "max_steps": 6, "learning_rate": 1e-3, "warmup_proportion": 0.0}
    saved["cooldown_proportion"] = 0.0 if schedule == "cosine" else 4 / 6
    (folder / "train_config.json").write_text(json.dumps(saved))
    branch, _ = branched(config(inputs, branch_from=folder))
    assert learning_rate(branch, 3) == pytest.approx({"trapezoid": 0.75e-3}.get(schedule, peak))
    assert learning_rate(branch, 6) == pytest.approx(learning_rate(branch, 3) / 2)


def test_what_cannot_be_branched_from_is_one_line(inputs, stable, tmp_path):
    with pytest.raises(InputError, match=r"^--max_steps 3: the branch begins at step 3 and must end after it"):
        branched(config(inputs, branch_from=at(stable, 3), max_steps=3))
    with pytest.raises(InputError, match=r"^--branch_from: .*absent: neither a checkpoint nor a run"):
        branched(config(inputs, branch_from=tmp_path / "absent"))
    for flag, changes in (("--resume PATH", {"resume": "there"}), ("--initial_weights", {"initial_weights": "there"})):
        with pytest.raises(InputError, match=f"^--branch_from and {flag} name two starts; leave one out"):
            branched(config(inputs, branch_from=at(stable, 3), **changes))
    with pytest.raises(
        InputError, match=f"^--branch_from {re.escape(str(at(stable, 3)))} while the run 'stable' already has"
    ):
        find(branched(config(inputs, branch_from=at(stable, 3), name="stable", max_steps=9))[0])
    weights = shutil.copytree(at(stable, 3), tmp_path / "weights", ignore=shutil.ignore_patterns("training_state.pt"))
    with pytest.raises(
        InputError, match=r"weights holds weights and no run to go on with; --initial_weights starts one"
    ):
        branched(config(inputs, branch_from=weights))
    ended = shutil.copytree(at(stable, 6), tmp_path / "ended")
    saved = json.loads((ended / "train_config.json").read_text())
    for changes, message in (
        ({"schedule": "cosine", "cooldown_proportion": 0.5}, "ended: its learning rate has fallen to 0; branch off"),
        ({"learning_rate": "much"}, "ended: its train_config.json has no learning rate that can be"),
        ({"max_steps": None}, "ended: its train_config.json has no learning rate that can be"),
    ):
        (ended / "train_config.json").write_text(json.dumps(saved | changes))
        with pytest.raises(InputError, match=message):
            branched(config(inputs, branch_from=ended))


def test_steps_to_save_are_steps_of_the_run(inputs):
    with pytest.raises(InputError, match=r"--save_steps has 10, expected steps from 1 to --max_steps 9"):
        config(inputs, save_steps=[3, 10])
