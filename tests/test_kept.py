"""`--keep_best`: the checkpoint with the best value of a record stays, whatever kills the run."""

import json
import shutil

import pytest
import torch

from gptbert.checkpoint import kept
from gptbert.checkpoint.folder import list_checkpoints
from gptbert.checkpoint.kept import Best, BestCheckpoint, check_best
from gptbert.command_line import parse
from gptbert.config import TrainConfig
from gptbert.distributed.world import World
from gptbert.errors import InputError
from gptbert.monitoring.trackers import Trackers
from gptbert.train import fit
from gptbert.trainer import Trainer
from tests.runs import assert_same_end, flags, write_inputs

RECORD = "validation_ema/mlm/loss"
LOSSES = {2: 3.0, 4: 2.0, 6: 2.5, 8: 1.5, 10: 1.5, 12: 9.0}  # the best are of steps 2, 4 and 8
SETTINGS = {
    "no_compile": True, "max_steps": 12, "save_every": 3, "validate_every": 2, "validation_steps": 1, "resume": "auto",
    "keep_checkpoints": 1, "keep_best": RECORD, "global_batch_size": 4, "seq_length": 16, "log_every": 4,
}  # fmt: skip


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("kept"), train_characters=10_000)


def listed_losses(self, advance):
    """A validation's record."""
    advance(1)
    return {"validation/mlm/loss": 1.0, "validation/clm/loss": 1.0, RECORD: LOSSES.get(self.step, 9.0)}


@pytest.fixture(scope="module", autouse=True)
def losses():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "validation_record", listed_losses)
        yield


@pytest.fixture(scope="module")
def undisturbed(inputs):
    return run(inputs, "undisturbed")


def run(inputs, name, **changes):
    fit(parse(TrainConfig, flags(inputs, name=name, **SETTINGS | changes)))
    return inputs / "runs" / name


def steps(run_dir):
    return [int(path.name.removeprefix("step_")) for path in list_checkpoints(run_dir)]


def best(run_dir):
    content = json.loads((run_dir / "best.json").read_text())
    assert " rows of 16 tokens, masks 0.15, 0.1, 0.1, " in content.pop("measured_on")
    return content


def test_the_best_is_kept_and_the_former_best_ones_are_not(inputs, capfd):
    run_dir = run(inputs, "whole")
    assert best(run_dir) == {"record": RECORD, "value": 1.5, "step": 8}
    assert steps(run_dir) == [8, 12]
    path = run_dir / "checkpoints/step_00000008"
    assert f"best {RECORD} 1.5 after step 8: {path}" in capfd.readouterr().err
    run(inputs, "whole", max_steps=13, validate_every=0, keep_best=False)
    assert steps(run_dir) == [8, 13], "also by a run that looks for no best one"


MOMENTS = {
    "before the validation": (Trainer, "validate"),
    "before best.json": (Best, "write"),
    "before the former one is deleted": (kept, "delete_old"),
    "within the deletion": (shutil, "rmtree"),
    "before the record": (Trackers, "log"),
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("step", [4, 8])
def test_a_kill_loses_nothing(inputs, undisturbed, monkeypatch, step, moment):
    """Killed at a step with a new best one, of which no checkpoint is due otherwise."""
    name, (of, function) = f"{moment} {step}", MOMENTS[moment]
    run_dir, work = inputs / "runs" / name, getattr(of, function)

    def deadly(*args, **options):
        if f"step_{step:08d}" in str(list_checkpoints(run_dir)) and not (
            moment == "within the deletion" and best(run_dir)["step"] != step
        ):
            raise Killed
        return work(*args, **options)

    former = max(at for at in (2, 4, 8) if at < step)
    with monkeypatch.context() as patch:
        patch.setattr(of, function, deadly)
        with pytest.raises(Killed):
            run(inputs, name)
    named = best(run_dir)["step"]
    assert named in {former, step}
    assert {named, step} <= set(steps(run_dir)), "what is named is there, and so is the newest"
    run(inputs, name)
    assert best(run_dir) == {"record": RECORD, "value": 1.5, "step": 8}
    assert steps(run_dir) == [8, 12]
    assert_same_end(run_dir, undisturbed)


@pytest.mark.parametrize("function", [(kept, "delete_old"), (shutil, "rmtree")])
def test_a_kill_at_the_end_leaves_no_former_one(inputs, monkeypatch, function):
    """After the last step there is no other save that would delete it."""
    name = f"end {function[1]}"
    run_dir, work = inputs / "runs" / name, getattr(*function)

    def deadly(*args, **options):
        if (run_dir / "best.json").is_file() and best(run_dir)["step"] == 8:
            raise Killed
        return work(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(*function, deadly)
        with pytest.raises(Killed):
            run(inputs, name, max_steps=8)
    assert len(list((run_dir / "checkpoints").iterdir())) > 1
    run(inputs, name, max_steps=8)
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_00000008"]


def note(tmp_path, make_config, name, values, start=0, keep_checkpoints=9, measured_on=""):
    settings = {"output_dir": tmp_path, "name": "run", "keep_best": name, "pairs_path": ("pairs",)}
    config = make_config(**settings, keep_checkpoints=keep_checkpoints)
    keeper = BestCheckpoint(config, World(0, 1, torch.device("cpu")), measured_on)
    keeper.start(start)
    for step, value in enumerate(values, start=start + 1):
        (tmp_path / f"run/checkpoints/step_{step:08d}").mkdir(parents=True)
        keeper.note(step, {name: value, "another": 0.0})
    return Best.of(tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "values", "step"),
    [
        ("validation/clm/loss", [2.0, 1.0, 1.5], 2),
        ("validation_ema/clm/perplexity", [2.0, float("inf"), 1.5], 3),
        ("validation/mlm/accuracy", [0.2, 0.5, 0.5], 2),
        ("pairs/clm/accuracy", [0.7, 0.6], 1),
        ("validation/mlm/loss", [float("nan"), 3.0, float("nan")], 2),
    ],
)
def test_the_name_says_which_is_better(tmp_path, make_config, name, values, step):
    assert note(tmp_path, make_config, name, values) == Best(name, values[step - 1], step)


def test_the_former_one_is_deleted_at_once(tmp_path, make_config):
    note(tmp_path, make_config, "validation/mlm/loss", [3.0, 2.0, 2.5], keep_checkpoints=1)
    assert steps(tmp_path / "run") == [2, 3], "the third would be deleted by the next save"


def test_a_best_one_of_another_time_is_forgotten(tmp_path, make_config):
    name = "validation/mlm/loss"
    note(tmp_path, make_config, name, [2.0, 1.0])
    assert note(tmp_path, make_config, name, [1.5], start=2) == Best(name, 1.0, 2), "the run goes on"
    assert note(tmp_path, make_config, "validation/clm/loss", [3.0], start=3).value == 3.0, "another record"
    assert note(tmp_path, make_config, "validation/clm/loss", [3.5], 4, measured_on="a").step == 4, (
        "of an earlier version"
    )
    assert note(tmp_path, make_config, "validation/clm/loss", [2.0], 5, measured_on="a").step == 6
    assert note(tmp_path, make_config, "validation/clm/loss", [9.0], 6, measured_on="b").step == 7, "another file, say"
    shutil.rmtree(tmp_path / "run/checkpoints")
    assert note(tmp_path, make_config, "validation/clm/loss", [9.0] * 5) == Best("validation/clm/loss", 9.0, 1)
    (tmp_path / "run/checkpoints/step_00000001").rmdir()
    assert Best.of(tmp_path / "run") is None, "its checkpoint is gone"


def test_when_a_checkpoint_is_due(make_config):
    settings = {"max_steps": 20, "validate_every": 6, "score_every": 10, "pairs_path": ("pairs",)}
    world = World(0, 1, torch.device("cpu"))

    def due(name):
        return [
            step
            for step in range(1, 21)
            if BestCheckpoint(make_config(keep_best=name, **settings), world, "").is_due(step)
        ]

    assert due("validation/mlm/loss") == [6, 12, 18, 20]
    assert due("pairs/mlm/accuracy") == [10, 20]
    assert due(None) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_best": "valid/loss"}, r"valid/loss: no record of this run; expected one of validation/mlm/loss, "),
        ({"keep_best": "train/loss"}, "no record of this run"),
        ({"keep_best": "pairs/clm/accuracy"}, "needs minimal pairs; name their files with --pairs_path"),
        (
            {"keep_best": "pairs/mlm/accuracy", "hybrid_numerator": 0, "pairs_path": ("a",)},
            "one of .*, pairs/clm/accuracy$",
        ),
    ],
)
def test_a_record_that_is_none_is_refused(make_config, settings, message):
    with pytest.raises(InputError, match=message):
        check_best(make_config(**settings))


def test_a_record_of_the_run_is_taken(make_config):
    for name in (None, "validation/mlm/loss", "validation_ema/clm/accuracy", "pairs/clm/accuracy"):
        check_best(make_config(keep_best=name, pairs_path=("a",)))


@pytest.mark.parametrize("content", ["", "[1]", '{"record": "x", "value": "1", "step": 3}', '{"record": "x"}'])
def test_a_damaged_file_is_named(tmp_path, make_config, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/best.json").write_text(content)
    with pytest.raises(InputError, match=r"best.json: "):
        check_best(make_config(output_dir=tmp_path, name="run"))
