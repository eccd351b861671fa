"""Checkpoints: complete or absent, the newest kept, found again; a damaged one is refused with a one-line error."""

import dataclasses
import errno
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from torch._subclasses.fake_tensor import FakeTensorMode

from gptbert.checkpoint import checkpoint
from gptbert.checkpoint import weights as weights_module
from gptbert.checkpoint.checkpoint import Checkpoint
from gptbert.checkpoint.folder import list_checkpoints
from gptbert.checkpoint.resume import changed_schedules, changed_settings, find
from gptbert.checkpoint.saved_model import load_model
from gptbert.checkpoint.weights import write_weights
from gptbert.distributed.world import World
from gptbert.errors import InputError
from gptbert.io.json_file import write_json
from gptbert.model import GPTBert
from gptbert.optim import Lamb

FILES = {
    "model.safetensors", "ema.safetensors", "training_state.pt", "model_config.json", "train_config.json",
    "tokenizer.json", "manifest.json",
}  # fmt: skip
ALONE = World(0, 1, torch.device("cpu"))
SKIPPED = torch.tensor([7, 1, 3])
RANDOM_STATE = torch.Generator().manual_seed(3).get_state()


@pytest.fixture(scope="module")
def trained(tiny):
    """A model, its EMA and an optimizer with state."""
    torch.manual_seed(0)
    model, ema = GPTBert(tiny), GPTBert(tiny)
    optimizer = Lamb(model.parameters())
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    return model, ema, optimizer


@pytest.fixture
def run(make_config, tmp_path):
    """A run's settings, with its folder in the state before the first save."""
    config = make_config(output_dir=tmp_path, name="run", keep_checkpoints=2)
    config.run_dir.mkdir()
    (config.run_dir / "tokenizer.json").write_text('{"a": 1}', encoding="utf-8")
    return config


@pytest.fixture
def save(run, tiny, trained):
    def save(step, config=run, mask_counts=None):
        model, ema, optimizer = trained
        states = [{"random": {"cpu": RANDOM_STATE}, "sums": torch.full((2, 4), 0.5)}]
        weights = (model.state_dict(), ema.state_dict())
        state = Checkpoint(step, *weights, optimizer.state_dict(), states, SKIPPED, mask_counts)
        return checkpoint.save(state, config, tiny, ALONE)

    return save


def names(run):
    folder = run.run_dir / "checkpoints"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_everything_comes_back_to_the_bit(run, save, tiny, trained):
    path = save(7, mask_counts=torch.arange(9, dtype=torch.uint8))
    assert path == run.run_dir / "checkpoints" / "step_00000007"
    assert {file.name for file in path.iterdir()} == FILES
    loaded = checkpoint.load(path, tiny)
    model, ema, optimizer = trained
    for weights, expected in ((loaded.model, model), (loaded.ema, ema)):
        assert set(weights) == set(expected.state_dict())
        assert all(torch.equal(weights[key], tensor) for key, tensor in expected.state_dict().items())
    assert not torch.equal(loaded.model["head.dense.weight"], loaded.ema["head.dense.weight"])
    fresh = Lamb(GPTBert(tiny).parameters())
    fresh.load_state_dict(loaded.optimizer)
    for one, other in zip(fresh.state.values(), optimizer.state.values(), strict=True):
        assert all(torch.equal(one[key], other[key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    assert loaded.step == 7
    assert torch.equal(loaded.rank_states[0]["random"]["cpu"], RANDOM_STATE)
    assert torch.equal(loaded.skipped_steps, SKIPPED)
    assert torch.equal(loaded.mask_counts, torch.arange(9, dtype=torch.uint8))


def test_only_the_newest_are_kept(run, save):
    for step in (1, 2, 3, 4):
        save(step)
    assert names(run) == ["step_00000003", "step_00000004"]
    assert list_checkpoints(run.run_dir) == [run.run_dir / "checkpoints" / name for name in names(run)]


@pytest.mark.parametrize("kept", [1, 2, 3, 4, 6, 20])
def test_as_many_are_kept_as_asked_for(run, save, kept):
    config = dataclasses.replace(run, keep_checkpoints=kept)
    for step in range(1, 6):
        save(step, config=config)
    assert names(run) == [f"step_{step:08d}" for step in range(1, 6)][-kept:]


def test_steps_are_ordered_as_numbers(run, save):
    for step in (99_999_999, 100_000_000, 100_000_001):
        save(step)
    assert [path.name for path in list_checkpoints(run.run_dir)] == ["step_100000000", "step_100000001"]


def test_a_run_that_went_back_keeps_what_it_saves(run, save):
    """A run resumed from step 10 saves step 15, which is not the highest number and must still be kept."""
    for step in (10, 20):
        save(step)
    one_kept = dataclasses.replace(run, keep_checkpoints=1)
    assert save(15, config=one_kept).is_dir()


def test_saving_a_step_again_replaces_it(run, save, tiny):
    save(5)
    save(5, mask_counts=torch.ones(3, dtype=torch.uint8))
    assert names(run) == ["step_00000005"]
    assert checkpoint.load(run.run_dir / "checkpoints" / "step_00000005", tiny).mask_counts is not None


def failures():
    disk_full = OSError(28, "No space left on device")
    return [
        ("gptbert.checkpoint.weights.save_file", SafetensorError("I/O error: No space left on device")),
        ("gptbert.checkpoint.weights.save_file", disk_full),
        ("torch.save", RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0\nmore")),
        ("torch.save", disk_full),
        ("gptbert.checkpoint.folder.write_json", disk_full),
        ("shutil.copyfile", disk_full),
        ("os.fsync", disk_full),
        ("pathlib.Path.rename", disk_full),
    ]


@pytest.mark.parametrize(("function", "error"), failures())
def test_a_save_that_fails_leaves_the_old_ones_and_nothing_else(run, save, tiny, monkeypatch, function, error):
    def fail(*args, **options):
        raise error

    for step in (1, 2):
        save(step)
    with monkeypatch.context() as patch:
        patch.setattr(function, fail)
        with pytest.raises(InputError, match="step_00000003: cannot be written") as caught:
            save(3)
    assert "\n" not in str(caught.value)
    assert names(run) == ["step_00000001", "step_00000002"]
    for path in list_checkpoints(run.run_dir):
        assert checkpoint.load(path, tiny).step == int(path.name[5:])
    save(3)
    assert names(run) == ["step_00000002", "step_00000003"]


@pytest.mark.parametrize(
    "function", ["gptbert.checkpoint.weights.save_file", "torch.save", "os.fsync", "pathlib.Path.rename"]
)
def test_a_save_killed_half_way_is_no_checkpoint_and_is_cleaned_up(run, save, monkeypatch, function):
    class Killed(BaseException):
        pass

    def die(*args, **options):
        raise Killed

    save(1)
    with monkeypatch.context() as patch:
        patch.setattr(function, die)
        with pytest.raises(Killed):
            save(2)
    assert list_checkpoints(run.run_dir) == [run.run_dir / "checkpoints" / "step_00000001"]
    assert find(dataclasses.replace(run, resume="auto")).name == "step_00000001"
    save(3)  # a different step from the interrupted one
    assert names(run) == ["step_00000001", "step_00000003"]


def test_an_old_one_that_cannot_be_deleted_ends_no_run(run, save, monkeypatch, capsys):
    """As on NFS, while another program has a file of it open."""

    def busy(path, *args, **options):
        raise OSError(errno.EBUSY, "Device or resource busy", str(path))

    for step in (1, 2):
        save(step)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        assert save(3).is_dir()
    assert "step_00000001: cannot be deleted whole ([Errno 16] Device or resource busy" in capsys.readouterr().err
    assert [path.name for path in list_checkpoints(run.run_dir)] == ["step_00000002", "step_00000003"]
    save(4)
    assert names(run) == ["step_00000003", "step_00000004"]


def test_of_a_link_to_a_checkpoint_the_link_is_deleted(run, save, tmp_path):
    """Someone has moved checkpoints to another disk, and left links in their places."""
    moved = [save(step).rename(tmp_path / f"moved {step}") for step in (1, 2)]
    for step, path in enumerate(moved, start=1):
        (run.run_dir / "checkpoints" / f"step_{step:08d}").symlink_to(path)
    save(2)
    assert not (run.run_dir / "checkpoints" / "step_00000002").is_symlink()
    save(3)
    assert names(run) == ["step_00000002", "step_00000003"]
    assert all((path / "training_state.pt").is_file() for path in moved)


def test_a_deletion_killed_half_way_is_cleaned_up(run, save, monkeypatch):
    class Killed(BaseException):
        pass

    real = shutil.rmtree

    def die(path, *args, **options):
        if str(path).endswith(".deleted"):
            raise Killed
        real(path, *args, **options)

    for step in (1, 2):
        save(step)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", die)
        with pytest.raises(Killed):
            save(3)
    assert [path.name for path in list_checkpoints(run.run_dir)] == ["step_00000002", "step_00000003"]
    # a later deletion must not fail on what the killed one left
    save(1, config=dataclasses.replace(run, keep_checkpoints=9))
    save(4)
    assert names(run) == ["step_00000003", "step_00000004"]


@pytest.mark.parametrize("name", sorted(FILES - {"train_config.json", "tokenizer.json", "manifest.json"}))
@pytest.mark.parametrize("damage", ["missing", "empty", "half", "garbage"])
def test_a_damaged_checkpoint_is_refused_in_one_line(save, tiny, name, damage):
    path = save(1)
    file = path / name
    content = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes(
            {"empty": b"", "half": content[: len(content) // 2], "garbage": b"\x80\x02garbage" * 50}[damage]
        )
    with pytest.raises(InputError, match=re.escape(str(path))) as error:
        checkpoint.load(path, tiny)
    assert "\n" not in str(error.value)
    assert name in str(error.value)
    if name != "model_config.json":
        assert "--resume auto takes the one before" in str(error.value)
    if name in {"ema.safetensors", "model_config.json"}:
        with pytest.raises(InputError) as error:
            load_model(path)
        assert "\n" not in str(error.value)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_to_the_state_is_an_input_error_or_none(save, tiny, data):
    path = save(1)
    file = path / "training_state.pt"
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    message = ""
    try:
        checkpoint.load(path, tiny)
    except InputError as error:
        message = str(error)
    assert "\n" not in message


@pytest.mark.parametrize("content", [[1, 2], {"step": 3}, {}, None, "text"])
def test_a_state_with_other_content_is_refused(save, tiny, content):
    path = save(1)
    torch.save(content, path / "training_state.pt")
    with pytest.raises(InputError, match="damaged"):
        checkpoint.load(path, tiny)


def test_code_in_a_checkpoint_is_not_run(save, tiny, tmp_path):
    class Malicious:
        def __reduce__(self):
            return (tmp_path / "executed").touch, ()

    path = save(1)
    torch.save({"step": Malicious()}, path / "training_state.pt")
    with pytest.raises(InputError):
        checkpoint.load(path, tiny)
    assert not (tmp_path / "executed").exists()


def test_another_models_checkpoint_is_named(save, tiny):
    other = dataclasses.replace(tiny, hidden_size=32, vocab_size=70)
    with pytest.raises(InputError, match="hidden_size 16 there, 32 here, vocab_size 64 there, 70 here"):
        checkpoint.load(save(1), other)


def test_a_fresh_run_does_not_walk_over_an_old_one(run, save):
    assert find(run) is None
    save(1)
    with pytest.raises(InputError, match=r"run already holds checkpoints.*--resume auto"):
        find(run)
    assert find(dataclasses.replace(run, name="other")) is None


def test_auto_takes_the_newest_or_starts(run, save):
    auto = dataclasses.replace(run, resume="auto")
    assert find(auto) is None
    for step in (2, 10):
        save(step)
    (run.run_dir / "checkpoints" / ".step_00000011.incomplete").mkdir()
    (run.run_dir / "checkpoints" / "step_00000012").touch()
    assert find(auto).name == "step_00000010"


def test_a_path_names_a_checkpoint_or_a_run(run, save, tmp_path):
    paths = [save(1), save(2)]
    elsewhere = dataclasses.replace(run, name="elsewhere")
    assert find(dataclasses.replace(elsewhere, resume=str(paths[0]))) == paths[0]
    assert find(dataclasses.replace(elsewhere, resume=str(run.run_dir))) == paths[1]
    for wrong in (tmp_path, tmp_path / "none", run.run_dir / "tokenizer.json"):
        with pytest.raises(InputError, match=f"--resume {re.escape(str(wrong))}: not a checkpoint"):
            find(dataclasses.replace(run, resume=str(wrong)))


def test_settings_that_changed_are_listed(run, save, tmp_path):
    path = save(1)
    assert changed_settings(path, run) == []
    moved = dataclasses.replace(run, resume="auto", name="other", huge_pages=False, learning_rate=0.5, seed=1)
    rate, seed = changed_settings(path, moved)
    assert rate == "--learning_rate 0.001 -> 0.5"
    assert seed.startswith("--seed 42 -> 1 (in the rest of this epoch some documents repeat")
    mixed = dataclasses.replace(run, train_path=(Path("none"), Path("b")), train_weights=(0.7, 1.0))
    changes = ["--train_path none -> none b", "--train_weights None -> 0.7 1.0"]
    assert changed_settings(path, mixed) == changes


def test_what_changed_settings_do_at_once_is_said(run, save):
    """A run that had ended goes on with the learning rate of a middle."""
    then = dataclasses.replace(run, max_steps=100, learning_rate=1e-3, global_batch_size=100, mask_p_end=0.3)
    write_json(save(100) / "train_config.json", then.to_dict())
    path = run.run_dir / "checkpoints/step_00000100"
    assert changed_schedules(path, 100, then) == changed_schedules(path, 100, dataclasses.replace(then, seed=1)) == ""
    assert changed_schedules(path, 100, dataclasses.replace(then, max_steps=200)) == (
        "so that from here on: learning_rate 0.000561 instead of 0, batch_size 63 instead of 100"
    )
    write_json(path / "train_config.json", {"max_steps": 100})
    assert changed_schedules(path, 100, then) == "", "of an earlier version"


def test_checkpoints_from_before_corpora_and_huge_pages_could_be_chosen_have_not_changed(run, save):
    path = save(1)
    settings = json.loads((path / "train_config.json").read_text())
    (settings["train_path"],) = settings["train_path"]
    del settings["train_weights"], settings["huge_pages"]
    (path / "train_config.json").write_text(json.dumps(settings))
    assert changed_settings(path, run) == []


def test_load_model_gives_the_weights_that_were_asked_for(run, save, trained):
    path = save(1)
    tokens = torch.randint(5, 64, (2, 9))
    ids = torch.zeros_like(tokens)
    for source in (path, run.run_dir, str(path)):
        for weights, expected in (("model", trained[0]), ("ema", trained[1])):
            model = load_model(source, weights)
            assert not model.training
            assert torch.equal(model.encode(tokens, ids, causal=True), expected.encode(tokens, ids, causal=True))


def test_load_model_of_nothing_is_an_input_error(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match="neither a checkpoint nor a run"):
            load_model(path)


def test_weights_of_a_gpu_are_copied_to_the_host_and_not_beside_themselves(tiny, tmp_path, monkeypatch):
    """A GPU that is nearly full, or whose free memory is that of recorded steps, has no room for a second model."""
    saved = {}
    monkeypatch.setattr(weights_module, "save_file", lambda tensors, _: saved.update(tensors))
    monkeypatch.setattr(weights_module, "to_upstream", lambda weights, _: weights)
    with FakeTensorMode():  # needs no GPU
        write_weights(tmp_path / "model.safetensors", {"weight": torch.ones(3, device="cuda")}, tiny)
    assert saved["weight"].device.type == "cpu"
