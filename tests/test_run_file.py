"""Flags from a YAML or TOML file: the same run as from the command line, which counts more; mistakes name the line."""

import dataclasses
import re
import sys
from pathlib import Path

import pytest
import yaml

from gptbert.checkpoint.folder import list_checkpoints
from gptbert.command_line import parse
from gptbert.config import TrainConfig
from gptbert.errors import InputError
from gptbert.io.run_file import write_run_file
from gptbert.train import fit, main
from tests.runs import assert_same_checkpoint, flags, write_inputs

YAML = """\
# a run
train_path: [a.safetensors, b.bin]
valid_path: v.safetensors
config_file: small
tokenizer_path: "t.json"
train_weights: [1, 0.5]
learning_rate: 1e-3
mixed_precision: true
compile: false
trackers: []
wandb_entity: null
name: -x
"""
TOML = """\
train_path = ["a.safetensors", "b.bin"]
valid_path = "v.safetensors"
config_file = "small"
tokenizer_path = "t.json"
train_weights = [1, 0.5]
learning_rate = 1e-3
mixed_precision = true
compile = false
trackers = []
name = "-x"
"""
LINE = [
    "--train_path", "a.safetensors", "b.bin", "--valid_path=v.safetensors", "--config_file=small",
    "--tokenizer_path=t.json", "--train_weights", "1", "0.5", "--learning_rate=1e-3", "--mixed_precision",
    "--no_compile", "--trackers", "--name=-x",
]  # fmt: skip


def put(folder, text, name="run.yaml"):
    (folder / name).write_text(text)
    return folder / name


@pytest.mark.parametrize(("name", "text"), [("a.yaml", YAML), ("a.yml", YAML), ("a.toml", TOML)])
def test_a_file_says_what_a_command_line_says(tmp_path, name, text):
    file = put(tmp_path, text, name)
    assert parse(TrainConfig, ["--run_file", str(file)]) == parse(TrainConfig, LINE)
    assert parse(TrainConfig, [f"--run-file={file}"]) == parse(TrainConfig, LINE)


@pytest.mark.parametrize(
    "own",
    [
        ["--learning_rate", "2"],
        ["--no_mixed_precision", "--compile"],
        ["--trackers", "wandb"],
        ["--train-weights", "3", "4"],
    ],
)
def test_the_command_line_counts_more(tmp_path, own):
    file = put(tmp_path, YAML)
    expected = parse(TrainConfig, [*LINE, *own])
    assert expected != parse(TrainConfig, LINE)
    assert parse(TrainConfig, ["--run_file", str(file), *own]) == expected
    assert parse(TrainConfig, [*own, "--run_file", str(file)]) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "max_steps: 10\nlerning_rate: 1",
            r"run.yaml:2: there is no flag --lerning_rate; did you mean learning_rate\?",
        ),
        ("run_file: other.yaml", r"run.yaml:1: there is no flag --run_file"),
        ("max_steps: 10\nmax_steps: 20", r"run.yaml:2: max_steps is there twice; name it once"),
        ("name: on", r"run.yaml:1: name is True, expected no truth value; a text such as on, yes or no needs quotes"),
        ("\ncompile: 1", r"run.yaml:2: compile is 1, expected true or false"),
        ("train_path:\n  a: b", r"run.yaml:1: train_path has values inside of values"),
        ("max_steps: [", r"run.yaml:1: not YAML \(.*\)"),
        ("- max_steps", r"run.yaml: expected flags and their values, such as max_steps: 1000"),
        ("max_steps: 10\nwarmup_proportion: 7\n", r"^--warmup_proportion is 7.0, .* to 1 \(from .*run.yaml:2\)$"),
        ("a: \0", r"run.yaml: not YAML \(unacceptable character"),
        ("!!python/object/apply:os.system [true]", r"run.yaml:1: not YAML"),
        ("a: &a [*a]", r"there is no flag --a"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_place(tmp_path, text, message):
    file = put(tmp_path, text)
    with pytest.raises(InputError, match=message):
        parse(TrainConfig, ["--run_file", str(file), *LINE])


@pytest.mark.parametrize("name", ["007", "2024_01", "12:30:00", "1.10", "0x1f", "2024-01-05", ".5", "1e3"])
def test_a_name_of_digits_is_what_is_written(tmp_path, name):
    """YAML alone would read 7, 202401, 45000 and 1.1."""
    assert (
        parse(TrainConfig, ["--run_file", str(put(tmp_path, f"{YAML}name: {name}".replace("name: -x\n", "")))]).name
        == name
    )


def test_home_and_variables_are_those_of_shells(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("JOB", "17")
    file = put(tmp_path, "output_dir: ~/runs\ntrain_path: [~/a, $JOB/b]\nresume: ~/x\nname: of_${JOB}\n")
    config = parse(TrainConfig, [*LINE[3:-1], "--run_file", str(file)])
    assert [*map(str, (config.output_dir, *config.train_path, config.resume)), config.name] == [
        "/home/me/runs", "/home/me/a", "17/b", "/home/me/x", "of_17",
    ]  # fmt: skip
    assert str(parse(TrainConfig, [*LINE, "--output_dir=~/runs"]).output_dir) == "/home/me/runs"
    assert parse(TrainConfig, [*LINE, "--name=~x"]).name == "~x"
    with pytest.raises(
        InputError, match=r"run.yaml:2: output_dir has \$SCRATCH_9, which the environment has not; set it"
    ):
        parse(TrainConfig, [*LINE, "--run_file", str(put(tmp_path, "name: a\noutput_dir: $SCRATCH_9/runs\n"))])


def test_a_flag_that_is_there_twice_is_said(capfd):
    config = parse(TrainConfig, [*LINE, "--train-path", "c.bin", "d.bin", "--seed=1", "--compile", "--seed=2"])
    assert (config.train_path, config.seed) == ((Path("c.bin"), Path("d.bin")), 2)
    said = "given more than once, where the last one counts: --train_path, --compile, --seed"
    assert capfd.readouterr().err.splitlines() == [said]


@pytest.mark.parametrize(
    "arguments", [["--mixed_precision=true"], ["--mixed-precision", "True"], ["--no_compile", "1"]]
)
def test_a_switch_with_a_value_is_explained(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse(TrainConfig, [*LINE, *arguments])
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        r"error: --(mixed_precision|compile) \w+: is a switch without a value; .* --no_\w+ is off", line
    )


def test_a_value_that_no_flag_takes_names_the_file(tmp_path, capsys):
    file = put(tmp_path, "max_steps: ten\n")
    with pytest.raises(SystemExit) as end:
        parse(TrainConfig, ["--run_file", str(file), *LINE])
    assert end.value.code == 2
    line = capsys.readouterr().err.strip()
    assert "--max_steps" in line.replace("max-steps", "max_steps")
    assert line.endswith(f"(from {file}:1)")
    assert "\n" not in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run_file", "absent.yaml"], r"--run_file absent.yaml: cannot be read \(No such file or directory\)"),
        (["--run_file", "a.txt"], r"--run_file a.txt: expected a file of YAML or TOML whose name ends in"),
        (["--run_file=a.yaml", "--run_file=b.yaml"], "--run_file is there 2 times; name one file"),
    ],
)
def test_files_that_cannot_be_read(arguments, message):
    with pytest.raises(InputError, match=message):
        parse(TrainConfig, arguments)


def test_all_settings_come_back(tmp_path):
    odd = parse(TrainConfig, [*LINE, "--resume=auto", "--checkpoint_words", "1M", "babylm", "--optimizer_eps", "1e-12"])
    for config in (odd, parse(TrainConfig, LINE), parse(TrainConfig, flags(tmp_path))):
        write_run_file(tmp_path / "run.yaml", config)
        assert parse(TrainConfig, ["--run_file", str(tmp_path / "run.yaml")]) == config
    names = set(yaml.safe_load((tmp_path / "run.yaml").read_text()))
    assert names == {field.name for field in dataclasses.fields(TrainConfig)} - {"run_file"}


def test_a_runs_file_starts_the_same_run(tmp_path, monkeypatch):
    inputs = write_inputs(tmp_path)
    fit(parse(TrainConfig, flags(inputs, name="one", max_steps=3, no_compile=True)))
    line = ["train", "--run_file", str(inputs / "runs/one/run.yaml"), "--name", "two"]
    monkeypatch.setattr(sys, "argv", line)
    main()
    assert_same_checkpoint(*(list_checkpoints(inputs / "runs" / name)[-1] for name in ("one", "two")))
