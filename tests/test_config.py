"""The model's JSON file and the command line: accepted values, and one-line errors that name the rejected ones."""

import dataclasses
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gptbert.command_line import STOPPED, parse, run_command
from gptbert.config import ModelConfig, TrainConfig
from gptbert.errors import InputError, LostProcessError, SharedError, StoppedError

ROOT = Path(__file__).parents[1]
# flags in users' scripts, with their values
USERS_FLAGS = {
    "train_path": "../bin/train_tokenized.bin",
    "valid_path": "../bin/val_tokenized.bin",
    "config_file": "../configs/config.json",
    "tokenizer_path": "../tokenizers/tokenizer.json",
    "output_dir": "../checkpoints",
    "name": "Run Name",
    "hybrid_numerator": 1,
    "hybrid_denominator": 4,
    "seq_length": 128,
    "local_batch_size": 32,
    "global_batch_size": 128,
    "learning_rate": 1e-3,
    "max_steps": 40000,
    "optimizer": "lamb",
    "weight_decay": 0.1,
    "warmup_proportion": 0.016,
    "cooldown_proportion": 0.016,
    "mask_p_start": 0.3,
    "mask_p_end": 0.15,
    "mask_random_p": 0.1,
    "mask_keep_p": 0.1,
    "mixed_precision": None,
    "validate_every": 1000,
    "save_every": 1000,
    "seed": 42,
}
REQUIRED = ["--train_path=t", "--valid_path=v", "--config_file=c", "--tokenizer_path=k"]


def model_json(tmp_path, tiny, *, drop=(), **changes):
    values = {**dataclasses.asdict(tiny), **changes}
    path = tmp_path / "model.json"
    path.write_text(json.dumps({key: value for key, value in values.items() if key not in drop}), encoding="utf-8")
    return path


def test_model_config_round_trip(tmp_path, tiny):
    assert ModelConfig.from_json(model_json(tmp_path, tiny)) == tiny
    assert ModelConfig.from_json(str(model_json(tmp_path, tiny))) == tiny


@pytest.mark.parametrize("name", ["tiny", "small", "base"])
def test_configs_of_the_repository_are_valid(name):
    config = ModelConfig.from_json(ROOT / "configs" / f"{name}.json")
    published = {"small": (384, 1280, 6, 12, 8192), "base": (768, 2560, 12, 12, 16384)}
    shape = (
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_hidden_layers,
        config.vocab_size,
    )
    assert shape == published.get(name, shape)


def test_shapes_have_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert ModelConfig.from_json("small") == ModelConfig.from_json(ROOT / "configs" / "small.json")
    (tmp_path / "small").write_bytes((ROOT / "configs" / "tiny.json").read_bytes())
    assert ModelConfig.from_json("small") == ModelConfig.from_json("tiny"), "a file counts more"
    with pytest.raises(
        InputError, match=r"^model config large: no such file, nor one of 1b, base, base_32k, small, tiny$"
    ):
        ModelConfig.from_json("large")


@pytest.mark.parametrize("key", [field.name for field in dataclasses.fields(ModelConfig)])
def test_a_missing_or_wrongly_typed_key_is_named(tmp_path, tiny, key):
    with pytest.raises(InputError, match=rf"model\.json: missing key {key}$"):
        ModelConfig.from_json(model_json(tmp_path, tiny, drop=[key]))
    for wrong in ("8", None, True, [8], {}):
        with pytest.raises(InputError, match=rf"model\.json: {key} is .*expected"):
            ModelConfig.from_json(model_json(tmp_path, tiny, **{key: wrong}))


@pytest.mark.parametrize("key", ["hiden_size", "n_layers", "HIDDEN_SIZE", "temperature", ""])
def test_an_unknown_key_is_named(tmp_path, tiny, key):
    with pytest.raises(InputError, match=rf"model\.json: unknown key {key} "):
        ModelConfig.from_json(model_json(tmp_path, tiny, **{key: 1}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", 16.0), ("hidden_size", 0), ("num_attention_heads", 3), ("num_attention_heads", -2),
        ("num_hidden_layers", 0), ("vocab_size", 0), ("intermediate_size", -1), ("position_bucket_size", 7),
        ("position_bucket_size", 2), ("max_position_embeddings", 8), ("hidden_dropout_prob", 1.0),
        ("hidden_dropout_prob", -0.1), ("attention_probs_dropout_prob", float("nan")), ("layer_norm_eps", 0),
        ("layer_norm_eps", float("nan")), ("layer_norm_eps", float("inf")),
    ],
)  # fmt: skip
def test_values_of_no_use_are_named(tmp_path, tiny, key, value):
    with pytest.raises(InputError, match=key):
        ModelConfig.from_json(model_json(tmp_path, tiny, **{key: value}))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"null", b"\xff\xfe", b'"text"'])
def test_files_that_are_no_json_object_are_refused_in_one_line(tmp_path, content):
    path = tmp_path / "model.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"model\.json") as error:
        ModelConfig.from_json(path)
    assert "\n" not in str(error.value)


def test_missing_files_and_folders_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        ModelConfig.from_json(tmp_path / "none.json")
    with pytest.raises(InputError, match="cannot be read"):
        ModelConfig.from_json(tmp_path)


def test_configs_cannot_be_changed(tiny, make_config):
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny.hidden_size = 4
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_config().seed = 4


@pytest.mark.parametrize("separate", [False, True])
def test_the_users_command_line_parses(separate):
    arguments = []
    for name, value in USERS_FLAGS.items():
        if value is None:
            arguments.append(f"--{name}")
        else:
            arguments += [f"--{name}", str(value)] if separate else [f"--{name}={value}"]
    config = parse(TrainConfig, arguments)
    for name, value in USERS_FLAGS.items():
        expected = {"mixed_precision": True, "train_path": (Path(USERS_FLAGS["train_path"]),)}.get(
            name, Path(value) if "path" in name or name[-3:] in {"ile", "dir"} else value
        )
        assert getattr(config, name) == expected, name


def test_defaults_are_those_of_the_recipe():
    config = parse(TrainConfig, REQUIRED)
    expected = {
        "optimizer_beta1": 0.9, "optimizer_beta2": 0.98, "optimizer_eps": 1e-8, "weight_decay": 0.1,
        "z_loss_weight": 1e-4, "warmup_proportion": 0.016, "cooldown_proportion": 0.016, "mask_p_start": 0.3,
        "mask_p_end": 0.15, "mask_random_p": 0.1, "mask_keep_p": 0.1, "max_gradient": 2.0, "ema_decay": 0.999,
        "batch_reduction": 4.0, "hybrid_numerator": 1, "hybrid_denominator": 4, "hybrid_mode": "auto",
        "optimizer": "lamb", "n_special_tokens": None, "mixed_precision": False, "token_weighted_loss": False,
        "seq_length_growth": False, "mask_history": False, "resume": None, "seed": 42, "seq_length": 128,
        "train_weights": (),
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected


def test_settings_survive_json(make_config):
    corpora = {"train_path": (Path("a"), Path("b")), "train_weights": (0.5, 2.0), "checkpoint_words": ("babylm", "2K")}
    config = make_config(name="a run", resume="auto", learning_rate=0.1, **corpora)
    values = json.loads(json.dumps(config.to_dict()))
    assert values == config.to_dict(), "or a checkpoint's settings would differ from the same ones"
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    paths = {name: Path(values[name]) for name in ("valid_path", "config_file", "tokenizer_path", "output_dir")}
    paths["train_path"] = tuple(map(Path, values["train_path"]))
    assert TrainConfig(**{**values, **paths}) == dataclasses.replace(config, **paths)
    assert set(values) == {field.name for field in dataclasses.fields(TrainConfig)}


@pytest.mark.parametrize(
    ("arguments", "trackers"),
    [
        ([], ("wandb",)),
        (["--trackers"], ()),
        (["--trackers", "--seed=1"], ()),
        (["--trackers", "wandb", "tensorboard"], ("wandb", "tensorboard")),
        (["--trackers=tensorboard"], ("tensorboard",)),
    ],
)
def test_the_flag_takes_any_number_of_trackers(arguments, trackers):
    assert parse(TrainConfig, [*REQUIRED, *arguments]).trackers == trackers


def test_help_mentions_every_flag(capsys):
    with pytest.raises(SystemExit) as end:
        parse(TrainConfig, ["--help"])
    assert end.value.code in {0, None}
    output = capsys.readouterr().out
    for field in dataclasses.fields(TrainConfig):
        assert re.search(rf"--{field.name}\b", output), field.name


def test_descriptions_in_the_help_are_filled_lines(capsys):
    """No line ends before its width, as where a docstring's line ends in the source."""
    with pytest.raises(SystemExit):
        parse(TrainConfig, ["--help"])
    lines = capsys.readouterr().out.splitlines()
    column, width = next(line.index("show this help") for line in lines if "-h, --help" in line), max(map(len, lines))
    of_descriptions = [line for line in lines if line[:column].isspace()]
    assert len(of_descriptions) > 100
    for line, following in itertools.pairwise(lines):
        if line[column:] and following[:column].isspace() and len(line[:column].rstrip()) < column - 1:
            assert len(line) + 1 + len(following.split()[0]) > width, line


def test_train_distributed_shows_its_help_and_its_mistakes():
    def run(*arguments):
        command = [sys.executable, ROOT / "train_distributed.py", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    shown = run("--help")
    assert shown.returncode == 0
    assert "--hybrid_numerator" in shown.stdout
    wrong = run(*REQUIRED, "--no_such_flag=1")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert re.fullmatch(r"error: .*no_such_flag.*\n", wrong.stderr)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--learning_rat=3"], "learning_rat"),
        (["--optimizer=sgd"], "sgd"),
        (["--max_steps=many"], "max_steps"),
        (["--seed"], "seed"),
        (["stray"], "stray"),
        (["--hybrid_mode=both"], "both"),
        (["--trackers", "wandb", "mlflow"], "mlflow"),
    ],
)
def test_a_mistaken_command_line_is_one_line_and_status_2(capsys, arguments, named):
    with pytest.raises(SystemExit) as end:
        parse(TrainConfig, [*REQUIRED, *arguments])
    shown = capsys.readouterr()
    assert end.value.code == 2
    assert shown.out == ""
    assert re.fullmatch(rf"error: .*{named}.*\n", shown.err), shown.err


def test_missing_flags_are_one_line_and_status_2(capsys):
    with pytest.raises(SystemExit) as end:
        parse(TrainConfig, REQUIRED[1:])
    assert end.value.code == 2
    assert re.fullmatch(r"error: .*train_path.*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seq_length", 1), ("local_batch_size", 0), ("global_batch_size", 0), ("batch_reduction", 0.5),
        ("batch_reduction", float("nan")), ("hybrid_numerator", -1), ("hybrid_denominator", 0), ("hybrid_numerator", 5),
        ("max_steps", 0), ("learning_rate", -1e-3), ("learning_rate", float("nan")), ("learning_rate", float("inf")),
        ("weight_decay", -0.1), ("optimizer_beta1", 1.0), ("optimizer_beta2", 1.0), ("optimizer_beta1", -0.1),
        ("optimizer_eps", -1.0), ("max_gradient", 0), ("max_gradient", -1), ("ema_decay", 1.1), ("z_loss_weight", -1),
        ("mask_p_start", 1.1), ("mask_p_end", -0.1), ("mask_random_p", 1.1), ("mask_keep_p", 0.95),
        ("validation_mask_p", 2), ("warmup_proportion", 1.5), ("cooldown_proportion", 0.99), ("n_special_tokens", 4),
        ("seed", -1), ("seed", 2**64), ("log_every", 0), ("save_every", -1), ("validate_every", -1),
        ("keep_checkpoints", 0), ("timeout", 0), ("cpu_threads", -1), ("validation_steps", -1),
    ],
)  # fmt: skip
def test_values_out_of_range_name_the_flag(make_config, name, value):
    with pytest.raises(InputError, match=f"--{name} ?") as error:
        make_config(**{name: value})
    assert "\n" not in str(error.value)


def test_clipping_is_turned_off_by_a_large_norm(make_config):
    with pytest.raises(InputError, match="1e9 clips none"):
        make_config(max_gradient=0)
    assert make_config(max_gradient=1e9).max_gradient == 1e9


@pytest.mark.parametrize(
    ("paths", "weights", "message"),
    [
        ((), (), "--train_path names no file"),
        (("a", "b", "a"), (), "--train_path names a twice"),
        (("a", "b"), (1.0,), "--train_weights: expected a number for each token file, found 1 for 2 of --train_path"),
        (("a",), (1.0, 2.0), "found 2 for 1"),
        (("a", "b"), (1.0, 0.0), r"--train_weights has 0\.0, expected positive"),
        (("a", "b"), (-1.0, 1.0), r"--train_weights has -1\.0"),
        (("a", "b"), (1.0, float("nan")), "--train_weights has nan"),
        (("a", "b"), (float("inf"), 1.0), "--train_weights has inf"),
    ],
)
def test_corpora_that_cannot_be_mixed_are_named(make_config, paths, weights, message):
    with pytest.raises(InputError, match=message) as error:
        make_config(train_path=tuple(map(Path, paths)), train_weights=weights)
    assert "\n" not in str(error.value)


def test_corpora_and_their_weights_on_the_command_line():
    arguments = ["--train_path", "a", "b.bin", *REQUIRED[1:], "--train_weights", "0.7", "3"]
    config = parse(TrainConfig, arguments)
    assert config.train_path == (Path("a"), Path("b.bin"))
    assert config.train_weights == (0.7, 3.0)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/root", "a\\b", "../x", "a\0b"])
def test_names_that_leave_the_output_folder_are_refused(make_config, name):
    with pytest.raises(InputError, match="--name"):
        make_config(name=name)


def test_names_with_spaces_are_a_folder(make_config):
    config = make_config(name="Run Name", output_dir=Path("runs"))
    assert config.run_dir == Path("runs/Run Name")


@pytest.mark.parametrize(
    ("error", "status", "speakers"),
    [
        (SharedError("flag is wrong"), 1, 1),
        (KeyboardInterrupt(), 130, 1),
        (StoppedError("stopped by SIGTERM"), STOPPED, 1),
        (InputError("only here"), 1, 2),
        (LostProcessError("another process has ended"), 1, 2),
    ],
)
def test_commands_end_with_a_status_and_one_line(capsys, monkeypatch, error, status, speakers):
    """An error common to all processes is printed once; an error of one process is printed by that process."""

    def fail(_):
        raise error

    monkeypatch.setattr("os._exit", sys.exit)  # with which one of several processes ends
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    for rank, lines in (("0", 1), ("3", speakers - 1)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit) as end:
            run_command(TrainConfig, fail, REQUIRED, under_torchrun=True)
        assert end.value.code == status
        assert capsys.readouterr().err.count("\n") == lines


def test_values_out_of_range_on_the_command_line_are_one_line(capsys):
    with pytest.raises(SystemExit) as end:
        run_command(TrainConfig, print, [*REQUIRED, "--mask_p_start=2"])
    assert end.value.code in {1, 2}
    assert re.fullmatch(r"error: --mask_p_start is 2\.0.*\n", capsys.readouterr().err)


def test_a_programming_error_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        run_command(TrainConfig, lambda _: 1 / 0, REQUIRED)
