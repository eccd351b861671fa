"""torch.compile without Inductor, for the rehearsal: Inductor takes minutes on a CPU."""

import pytest
import torch
from torch import nn


def trace_only(monkeypatch: pytest.MonkeyPatch, graphs: list | None = None, backend: str = "aot_eager") -> None:
    """Make compiled modules stop after tracing; `graphs` collects what was traced.

    With the backend "aot_eager_decomp_partition" they keep for the backward what Inductor would keep.
    """
    compile_module, run_traced = nn.Module.compile, torch._dynamo.lookup_backend(backend)

    def collecting(graph, inputs):
        if graphs is not None:
            graphs.append(graph)
        return run_traced(graph, inputs)

    def compile_only_traced(self, *, options=None, **settings):
        compile_module(self, backend=collecting, **settings)

    monkeypatch.setattr(nn.Module, "compile", compile_only_traced)
