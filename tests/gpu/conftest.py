"""The GPU's own lane, and its rehearsal on the CPU: the same tests at toy sizes, interpreted; see tests/README.md."""

import pytest
import torch

from kernels.backend import set_default_backend
from tests.gpu.compiled_run import trace_only
from tests.runs import write_inputs


@pytest.fixture(autouse=True, scope="session")
def a_gpu(device):
    """What every test here needs, unless it is rehearsed."""
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU here")


@pytest.fixture(autouse=True, scope="module")
def no_interpreter_unless_asked_for(device):
    """In the rehearsal, tests that are not about Triton's kernels do without them, and without C++ in compiled code."""
    with pytest.MonkeyPatch.context() as patch:
        if device.type == "cpu":
            patch.setenv("KERNELS_BACKEND", "torch")
        yield
        set_default_backend(None)  # a run of another backend may have been the last


@pytest.fixture(scope="session")
def sized(device):
    """Chooses between a size for a GPU and one for the rehearsal."""
    return lambda on_gpu, rehearsed: on_gpu if device.type == "cuda" else rehearsed


@pytest.fixture
def compiler(device, fresh_compiler, monkeypatch):
    """torch.compile as a GPU has it; in the rehearsal it traces, and leaves Inductor out, which takes minutes."""
    if device.type == "cpu":
        trace_only(monkeypatch)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Tokenizer, token files and models' shapes; see `tests.runs.write_inputs`."""
    return write_inputs(tmp_path_factory.mktemp("gpu"))
