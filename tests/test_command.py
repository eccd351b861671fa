"""The command `gptbert`: its first argument chooses another command, which has the rest."""

import importlib
import io
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from gptbert.__main__ import _COMMANDS, main
from gptbert.command_line import printing, run_command
from tests.runs import ROOT


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


PRINTING = (
    "from dataclasses import dataclass; from gptbert.command_line import run_command; "
    "run_command(dataclass(type('Settings', (), {})), lambda _: print('a line'), ARGUMENTS)"
)


@pytest.fixture(
    params=[
        ["-c", PRINTING.replace("ARGUMENTS", "[]")],
        ["-c", PRINTING.replace("ARGUMENTS", "['--help']")],
        ["-m", "gptbert", "--help"],
        ["-m", "gptbert", "--version"],
    ],
    ids=["result", "help", "gptbert --help", "gptbert --version"],
)
def printed_to(request):
    """Returns a function that has a command print to a file descriptor; returns its status and its last words."""

    def run(output, unbuffered=""):
        variables = os.environ | {"PYTHONUNBUFFERED": unbuffered}
        done = subprocess.run(
            [sys.executable, *request.param],
            env=variables,
            stdout=output,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            check=False,
        )
        return done.returncode, done.stderr.decode()

    return run


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_command_whose_reader_is_gone_ends_without_a_word(printed_to, unbuffered):
    reading, writing = os.pipe()
    os.close(reading)
    assert printed_to(writing, unbuffered) == (128 + signal.SIGPIPE, "")
    os.close(writing)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full is Linux's")
def test_output_on_a_full_disk_is_one_line(printed_to):
    with Path("/dev/full").open("w") as full:
        said = printed_to(full)
    assert said == (1, "error: standard output cannot be written: No space left on device\n")


@pytest.mark.parametrize(("encoding", "lines"), [("ascii", 1), ("cp1252", 1), ("utf-8", 0), ("UTF-16", 0)])
def test_what_an_encoding_lacks_becomes_an_escape(encoding, lines, monkeypatch, capsys):
    """Names of files may have surrogates, which no encoding has."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    with printing():
        print("één → \udcff\nmore →")
    shown = "één → \udcff\nmore →".encode(encoding, "backslashreplace").decode(encoding)
    assert stream.buffer.getvalue().decode(encoding) == f"{shown}\n"
    assert capsys.readouterr().err.splitlines() == lines * [
        f"standard output is in {encoding}: other characters become escapes; PYTHONIOENCODING=utf-8 keeps them"
    ]


@dataclass(frozen=True)
class PathSettings:
    one: Path
    several: tuple[Path, ...] = ()


@pytest.mark.parametrize("flag", ["--one", "--several"])
@pytest.mark.parametrize(
    ("name", "reason"), [("loop", "Too many levels of symbolic links"), ("n" * 300, "File name too long")]
)
def test_a_path_that_cannot_be_looked_up_is_not_taken_for_a_missing_one(name, reason, flag, tmp_path, capsys):
    """Nor is one without permission, which root, who may run this, has."""
    (tmp_path / "loop").symlink_to("loop")
    others = ["--one", str(tmp_path / "missing"), "--several", str(tmp_path), str(tmp_path / "missing" / "too")]
    run_command(PathSettings, lambda _: None, others)
    with pytest.raises(SystemExit, match="1"):
        run_command(PathSettings, lambda _: None, [*others, flag, str(tmp_path / name)])
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {tmp_path / name}: {reason}"
