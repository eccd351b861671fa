"""While a command's modules are imported, no garbage is collected."""

import gc
import subprocess
import sys

import pytest

from gptbert.io.imports import uncollected
from tests.runs import ROOT

COUNT = """
import gc, runpy, sys
collections = []
gc.callbacks.append(lambda phase, _: collections.append(phase))
sys.argv = ["train_distributed.py"]
runpy.run_path(sys.argv[0], run_name="imported")
print(len(collections), gc.isenabled(), gc.get_freeze_count() > 100_000, "gptbert.trainer" in sys.modules)
"""


@pytest.fixture
def collections():
    seen = []

    def note(phase, _):
        seen.append(phase)

    gc.callbacks.append(note)
    yield seen
    gc.callbacks.remove(note)


def test_nothing_is_collected_meanwhile_and_what_is_there_is_left_out(collections):
    before = gc.get_freeze_count()
    with uncollected():
        kept = [[] for _ in range(10_000)]
        assert not collections
    assert gc.isenabled()
    assert gc.get_freeze_count() >= before + len(kept)
    assert gc.collect() == 0
    assert collections


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


def test_a_run_starts_without_collections():
    done = subprocess.run([sys.executable, "-c", COUNT], cwd=ROOT, capture_output=True, text=True, check=True)
    number, *rest = done.stdout.split()
    assert int(number) < 10, "of `runpy` and `gptbert.io.imports`"
    assert rest == ["True"] * 3
