"""torch.compile without Inductor, for the rehearsal: what it would compile takes minutes on a CPU."""

import pytest
from torch import nn


def trace_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have modules compiled without a compiler behind the tracing."""
    compile_module = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, **options: compile_module(self, backend="aot_eager", **options)
    )
