"""Fixtures of the GPU lane and its CPU rehearsal: the same tests at toy sizes, interpreted; see tests/README.md."""

import importlib
import importlib.util
import os

import pytest
import torch

from tests.gpu.tracing import trace_only

NEED_TYRO = ["test_gpu_after_training.py", "test_gpu_step.py", "test_gpu_training.py"]
# without tyro, a bare machine with a GPU can still run the tests of kernels and model
collect_ignore = [] if importlib.util.find_spec("tyro") else NEED_TYRO


def pytest_runtest_logreport(report):
    """Print a failure at once, too: a lane that is killed has no summary."""
    if report.failed:
        print(f"\n{report.nodeid}\n{report.longreprtext}", flush=True)


def pytest_terminal_summary(terminalreporter):
    if collect_ignore:
        terminalreporter.write_line(f"without tyro, which runs need, left out: {', '.join(collect_ignore)}")


@pytest.fixture(autouse=True, scope="session")
def a_gpu(device):
    """Every test here needs a GPU, except in the rehearsal."""
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU here")


@pytest.fixture(autouse=True, scope="module")
def no_interpreter_unless_asked_for(device):
    """In the rehearsal, tests that do not name Triton run PyTorch's operations, and no C++ in compiled code."""
    with pytest.MonkeyPatch.context() as patch:
        if device.type == "cpu":
            patch.setenv("KERNELS_BACKEND", "torch")
        yield


@pytest.fixture(scope="session")
def sized(device):
    """Returns a function that chooses between a size for the GPU and one for the rehearsal, or a stand-in for a GPU."""
    is_fast = device.type == "cuda" and "STAND_IN_LIBRARY" not in os.environ
    return lambda on_gpu, rehearsed: on_gpu if is_fast else rehearsed


@pytest.fixture
def compiler(device, fresh_compiler, monkeypatch):
    """torch.compile as on a GPU; in the rehearsal it only traces, since Inductor takes minutes."""
    if device.type == "cpu":
        trace_only(monkeypatch)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Tokenizer, token files and model configurations; see `tests.runs.write_inputs`."""
    runs = importlib.import_module("tests.runs")  # imported here, since its command line needs tyro
    return runs.write_inputs(tmp_path_factory.mktemp("gpu"))
