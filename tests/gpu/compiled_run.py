"""Train like train_distributed.py, compiled even if the run is short: `python -m tests.gpu.compiled_run FLAGS…`.

Runs in its own process, since runs in one process share compiled code. Prints the number of graphs.
"""

import sys

import pytest
from torch._dynamo.utils import counters

from gptbert.command_line import parse
from gptbert.config import TrainConfig
from gptbert.train import fit
from gptbert.training import compile_choice
from tests.gpu.tracing import trace_only
from tests.lanes import DEVICE


def always_compile(monkeypatch: pytest.MonkeyPatch, backend: str = "aot_eager") -> None:
    """Compile runs of any length; the rehearsal only traces, to this backend, since Inductor takes minutes."""
    for device in compile_choice.COMPILE_SECONDS:
        monkeypatch.setitem(compile_choice.COMPILE_SECONDS, device, 0.0)
    if DEVICE == "cpu":
        trace_only(monkeypatch, backend=backend)


def main() -> None:
    with pytest.MonkeyPatch.context() as patch:
        always_compile(patch, backend="eager")
        fit(parse(TrainConfig, sys.argv[1:]))
    print(counters["stats"]["unique_graphs"])


if __name__ == "__main__":
    main()
