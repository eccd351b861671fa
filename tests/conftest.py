"""Shared fixtures. Those that return a function have session scope, as hypothesis requires."""

import atexit
import gc
import importlib
import importlib.util
import os
import shutil
import signal
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

from tests.lanes import DEVICE, NO_GPU

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what it runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
if DEVICE == "cpu":
    os.environ |= NO_GPU  # before anything looks for a GPU or imports a kernel
else:
    os.environ.pop("TRITON_INTERPRET", None)
# before transformers is imported: no network access, no writes to the user's cache
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="gptbert-hf-")

from gptbert.config import ModelConfig, TrainConfig
from gptbert.data.token_store import TokenStore
from kernels.backend import BACKENDS, set_default_backend
from kernels.interpreter import leave_out_dead_work
from kernels.wanted import use_fused
from tests.runs import TAKE_BF16, take_bf16
from tests.scans import scan_by_doubling

atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
settings.register_profile("fuzz", max_examples=10_000, deadline=None)  # for `make fuzz`, see tests/test_fuzz.py
collect_ignore_glob = ["test_*.py"] if DEVICE == "cuda" else []  # the GPU lane runs tests/gpu alone

TINY = ModelConfig(
    hidden_size=16,
    intermediate_size=24,
    num_attention_heads=2,
    num_hidden_layers=2,
    vocab_size=64,
    max_position_embeddings=32,
    position_bucket_size=8,
    attention_probs_dropout_prob=0.0,
    hidden_dropout_prob=0.0,
    layer_norm_eps=1e-5,
)


def pytest_collection_finish():
    """Leave what the tests import, a million objects, out of every later garbage collection."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_choice_stays():
    """A run sets its process's backend and fused operations; without this, later tests would inherit them."""
    set_default_backend(None)  # a module's fixture may have set it
    use_fused(())
    yield
    set_default_backend(None)
    use_fused(())


@pytest.fixture(autouse=True, scope="module")
def seed_of_a_module():
    """What its fixtures draw depends on no test before."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def seed_of_a_test():
    """What a test draws without a generator depends on no test before."""
    torch.manual_seed(0)


@pytest.fixture
def bf16_everywhere(monkeypatch):
    """Runs of this process, and of `forked_ranks`, compute in bf16 also where fp32 would be faster."""
    take_bf16(monkeypatch.setattr)
    monkeypatch.setenv(TAKE_BF16, "1")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def quick_interpreter():
    if DEVICE == "cpu" and importlib.util.find_spec("triton"):
        leave_out_dead_work()


@pytest.fixture(scope="session")
def device():
    """Device that kernels are tested on: the CPU, or the GPU in the GPU lane."""
    return torch.device(DEVICE)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Runs a test once for each implementation of an operation."""
    if request.param == "cpp" and DEVICE != "cpu":
        pytest.skip("C++ kernels are for CPUs")
    return request.param


@pytest.fixture(scope="module")
def parallel_scans():
    """Tree-order scans, as on a GPU: exposes non-associative combine functions, and is faster. Yields the original."""
    with pytest.MonkeyPatch.context() as patch:
        interpreter = importlib.import_module("triton.runtime.interpreter")
        own = interpreter.ScanOps.generic_scan
        patch.setattr(interpreter.ScanOps, "generic_scan", scan_by_doubling)
        yield own


@pytest.fixture
def fresh_compiler():
    """torch.compile with empty caches and zeroed counters."""
    torch.compiler.reset()
    importlib.import_module("torch._dynamo.utils").counters.clear()  # imported here, since most tests do not need it
    yield
    torch.compiler.reset()


@pytest.fixture(scope="session")
def tiny():
    """A model configuration small enough to run in milliseconds."""
    return TINY


@pytest.fixture(scope="session")
def make_config():
    """Returns a function that makes a TrainConfig, with any settings changed; its files need not exist."""

    def make(**changes):
        paths = dict.fromkeys(("valid_path", "config_file", "tokenizer_path"), "none")
        return TrainConfig(**{**paths, "train_path": (Path("none"),), **changes})

    return make


@pytest.fixture(scope="session")
def make_store():
    """Returns a function that makes an in-memory token store: document lengths; token ids 100, 101, … unless given."""

    def make(lengths, *, tokens=None, cuts=()):
        lengths = np.array(lengths, dtype=np.int64)
        tokens = np.arange(100, 100 + lengths.sum()) if tokens is None else np.array(tokens)
        offsets = [np.cumsum([0, *part]) for part in np.split(lengths, cuts)]
        shards = np.split(tokens.astype(np.uint32), np.cumsum([part[-1] for part in offsets])[:-1])
        return TokenStore(shards, offsets, vocab_size=int(tokens.max(initial=0)) + 1, tokenizer_hash=None)

    return make
