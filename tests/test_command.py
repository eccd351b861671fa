"""The command `gptbert`: its first argument chooses another command, which has the rest."""

import importlib
import os
import signal
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

from gptbert.__main__ import _COMMANDS, main


@pytest.fixture(autouse=True)
def own_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", [*sys.path])


def test_it_is_installed():
    assert entry_points(group="console_scripts")["gptbert"].load() is main


@pytest.mark.parametrize("name", _COMMANDS)
def test_each_command_is_called_by_its_name(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code in {0, None}
    assert capsys.readouterr().out.startswith(f"usage: gptbert {name} ")


def test_its_arguments_are_the_commands(capsys, tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    flags = ("--valid_fraction", "0", "--test_fraction", "0")
    main(["split", "--input", f"{tmp_path}/a.txt", "--output_dir", f"{tmp_path}/out", *flags])
    assert capsys.readouterr().out.startswith("wrote 2 train")
    with pytest.raises(SystemExit) as end:
        main(["train", "--train_path", "a"])
    assert end.value.code == 2
    assert "missing --" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "way_on"), [("tokenise", "did you mean tokenize?"), ("xyz", "gptbert --help lists them")]
)
def test_other_names_are_one_line(name, way_on, capsys):
    with pytest.raises(SystemExit) as end:
        main([name])
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: gptbert has no command {name!r}; {way_on}\n"


def test_every_command_that_a_module_offers_is_listed(capsys):
    main(["--help"])
    listed = capsys.readouterr().out
    for name, (module, what) in _COMMANDS.items():
        assert f"  {name} " in listed
        assert what in listed
        assert callable(importlib.import_module(module).main)


def test_without_a_checkout_there_are_no_benchmarks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("gptbert.__main__._CHECKOUT", tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["bench"])
    assert end.value.code == 1
    assert capsys.readouterr().err == "error: gptbert bench: the benchmarks are in a checkout of gptbert only\n"


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_a_command_whose_reader_is_gone_ends_without_a_word(arguments):
    program = (
        "from dataclasses import dataclass; from gptbert.command_line import run_command; "
        f"run_command(dataclass(type('Settings', (), {{}})), lambda _: print('a line'), {arguments})"
    )
    for unbuffered in ("", "1"):
        reading, writing = os.pipe()
        os.close(reading)
        variables = os.environ | {"PYTHONUNBUFFERED": unbuffered}
        done = subprocess.run(
            [sys.executable, "-c", program], env=variables, stdout=writing, stderr=subprocess.PIPE, check=False
        )
        os.close(writing)
        assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")
