"""While a command's modules are imported, no garbage is collected."""

import gc
import os
import re
import subprocess
import sys
import weakref

import pytest

from gptbert.io.imports import explained, uncollected
from tests.runs import ROOT

COUNT = """
import gc, runpy, sys
collections = []  # once PyTorch is imported, until everything is
gc.callbacks.append(lambda *_: collections.append("torch" in sys.modules and not gc.get_freeze_count()))
sys.argv = ["train_distributed.py"]
runpy.run_path(sys.argv[0], run_name="imported")
print(sum(collections), gc.isenabled(), gc.get_freeze_count() > 100_000, "gptbert.trainer" in sys.modules)
"""


@pytest.fixture
def collections():
    seen = []

    def note(phase, _):
        seen.append(phase)

    gc.callbacks.append(note)
    yield seen
    gc.callbacks.remove(note)


class Cycle:
    """Only a collection ends it."""

    def __init__(self):
        self.itself = self


def test_nothing_is_collected_meanwhile_and_what_is_there_is_left_out(collections):
    before, watched = gc.get_freeze_count(), []
    with uncollected():
        kept = [[] for _ in range(10_000)]
        watched.append(weakref.ref(Cycle()))
        assert not collections
    assert gc.isenabled()
    assert gc.get_freeze_count() >= before + len(kept)
    watched.append(weakref.ref(Cycle()))
    gc.collect()
    assert collections
    assert [reference() is None for reference in watched] == [False, True]


def test_afterwards_it_is_as_before():
    with pytest.raises(ImportError), uncollected():
        raise ImportError
    assert gc.isenabled()
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("TQDM_MININTERVAL", "abc", "could not convert string to float: 'abc'"),
        ("TQDM_NCOLS", "", "invalid literal for int() with base 10: ''"),
        ("TORCH_DISTRIBUTED_DEBUG", "much", "The value of TORCH_DISTRIBUTED_DEBUG must be OFF, INFO, or DETAIL."),
    ],
)
def test_a_variable_that_a_library_cannot_read_is_named(monkeypatch, capsys, name, value, message):
    monkeypatch.setenv("TORCH_OF_NOTHING", "1")
    monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match="1"), explained():
        raise ValueError(f"\n{message}\nmore")
    assert capsys.readouterr().err == f"error: {name} is {value!r}: {message}; unset it for the default\n"
    monkeypatch.delenv(name)
    with pytest.raises(ValueError, match="more"), explained():
        raise ValueError(f"{message}\nmore")


def test_a_library_that_is_not_installed_is_named(capsys):
    with pytest.raises(SystemExit, match="1"), explained():
        raise ModuleNotFoundError("No module named 'torch'", name="torch")
    way_on = "make install, or source .venv/bin/activate"
    assert capsys.readouterr().err == f"error: torch is not installed; {way_on}\n"
    for name in ("torch.no_such_part", "gptbert.gone", "benchmarks", None):
        with pytest.raises(ModuleNotFoundError), explained():
            raise ModuleNotFoundError(name=name)


@pytest.mark.parametrize("command", [["train_distributed.py"], ["-m", "gptbert", "train"]])
def test_commands_in_a_python_without_libraries_end_with_one_line(command):
    without = [sys.executable, "-S", *command]  # -S leaves out site-packages
    done = subprocess.run(without, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.fullmatch(r"error: \w+ is not installed; make install, or source \.venv/bin/activate\n", done.stderr)


def test_a_report_without_matplotlib_ends_with_one_line():
    without = "import runpy, sys; sys.modules['matplotlib'] = None; runpy.run_module('benchmarks.report')"
    done = subprocess.run([sys.executable, "-c", without], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: matplotlib is not installed; make install, or source .venv/bin/activate\n"


@pytest.mark.parametrize("command", [["train_distributed.py"], ["-m", "gptbert", "score", "RUN", "PAIRS"]])
def test_commands_name_it(command):
    environment = os.environ | {"TQDM_NCOLS": "wide"}
    command = [sys.executable, *command]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: TQDM_NCOLS is 'wide': ")
    assert done.stderr.count("\n") == 1


def test_a_run_starts_without_collections():
    done = subprocess.run([sys.executable, "-c", COUNT], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "True", "True", "True"]
