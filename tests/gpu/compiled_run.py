"""Train as train_distributed.py does, compiled however short: `python -m tests.gpu.compiled_run FLAGS…`.

A process of its own, since what one run compiled serves the next in the same process. Prints the number of graphs.
"""

import sys

import pytest
from torch import nn
from torch._dynamo.utils import counters

from gptbert.command_line import parse
from gptbert.config import TrainConfig
from gptbert.trainer import Trainer, fit
from tests.lanes import DEVICE


def always_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile runs of any length; in the rehearsal only trace, without Inductor, which takes minutes."""
    monkeypatch.setattr(Trainer, "_is_long_enough_to_compile", lambda self: True)
    if DEVICE == "cpu":
        trace_only(monkeypatch)


def trace_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have modules compiled without a compiler behind the tracing."""
    compile_module = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, **options: compile_module(self, backend="aot_eager", **options)
    )


def main() -> None:
    with pytest.MonkeyPatch.context() as patch:
        always_compile(patch)
        fit(parse(TrainConfig, sys.argv[1:]))
    print(counters["stats"]["unique_graphs"])


if __name__ == "__main__":
    main()
