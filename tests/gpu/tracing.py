"""torch.compile without Inductor, for the rehearsal: Inductor takes minutes on a CPU."""

import pytest
import torch
from torch import nn


def trace_only(monkeypatch: pytest.MonkeyPatch, graphs: list | None = None) -> None:
    """Make compiled modules stop after tracing; `graphs` collects what was traced."""
    compile_module, aot_eager = nn.Module.compile, torch._dynamo.lookup_backend("aot_eager")

    def backend(graph, inputs):
        if graphs is not None:
            graphs.append(graph)
        return aot_eager(graph, inputs)

    def compile_only_traced(self, *, options=None, **settings):
        compile_module(self, backend=backend, **settings)

    monkeypatch.setattr(nn.Module, "compile", compile_only_traced)
