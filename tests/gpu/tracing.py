"""torch.compile without Inductor, for the rehearsal: Inductor takes minutes on a CPU."""

import pytest
from torch import nn


def trace_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make compiled modules stop after tracing."""
    compile_module = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, **options: compile_module(self, backend="aot_eager", **options)
    )
