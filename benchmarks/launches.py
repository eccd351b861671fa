"""Launches of a training step by the fused kernels: `python -m benchmarks.launches [--json]`; no GPU is needed.

A step runs on the CPU, without compilation, with Triton's kernels in the interpreter, and every operation of PyTorch
that computes something counts as one launch, as does every launch of ours. Widths do not matter, so the model is a
narrow one. Not counted: what some operations launch several kernels for (the embedding's gradient sorts its ids). What
torch.compile would join counts apart. In fp32; under bf16 the head's weight is also narrowed.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self
from unittest.mock import patch

import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from benchmarks.bench_train_step import Case, random_trainer, training
from gptbert.command_line import run_command
from gptbert.config import ModelConfig
from gptbert.distributed.world import World
from gptbert.io.screen import table_row

BAR = 900  # for 12 layers
NARROW = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 1, "vocab_size": 512}
PHASES = ("forward", "backward", "update")
# kernels whose numbers decide nothing: the interpreter would take minutes for them
_NOT_RUN = ("attention_context.", "gated_norm.", "normalize.", "depth_mix.", "lamb.")
# without a kernel of their own: memory that is not filled, and what is known without the device
_FREE = {
    "empty",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "empty_like",
    "is_same_size",
    "detach",
    "lift_fresh",
}
_FREE |= {"_local_scalar_dense", "_assert_async", "_assert_scalar", "sym_size", "_unsafe_view", "_reshape_alias"}


@dataclass(frozen=True, kw_only=True)
class LaunchesConfig:
    """Count the launches of a training step."""

    config_file: Path = Path("configs/base_32k.json")
    """Model; its number of layers matters."""
    json: bool = False
    """Print one JSON object instead of a table."""


class Launches(TorchDispatchMode):
    """Counts launches while it is active.

    Attributes:
        phase: what the next launches belong to.
        counts: by phase and name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = "other"
        self.counts: dict[str, Counter[str]] = {}
        self._depth = 0

    def __enter__(self) -> Self:
        self._depth += 1
        if self._depth == 1:
            self._count_ours()
        return super().__enter__()

    def __exit__(self, *exception: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._patch.stop()
        super().__exit__(*exception)

    def _count_ours(self) -> None:
        from triton.runtime.interpreter import GridExecutor  # noqa: PLC0415 - Triton reads TRITON_INTERPRET then

        run = GridExecutor.__call__

        def counted_run(executor: Any, *args: Any, **kwargs: Any) -> None:
            name = executor.fn.__module__.removeprefix("kernels.") + "." + executor.fn.__name__
            self._count(name)
            if not name.startswith(_NOT_RUN):
                with _disable_current_modes():
                    run(executor, *args, **kwargs)

        self._patch = patch.object(GridExecutor, "__call__", counted_run)
        self._patch.start()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Operations of ours, and those that are made of others, by what they call."""
        del types
        kwargs = kwargs or {}
        name = func._schema.name  # noqa: SLF001
        if name in OPDEFS:
            with self:
                return OPDEFS[name]._init_fn(*args, **kwargs)  # noqa: SLF001
        if func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):  # noqa: SLF001
            with self:
                return func.decompose(*args, **kwargs)
        if not func.is_view and name.removeprefix("aten::") not in _FREE:
            self._count(name)
        return func(*args, **kwargs)

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Context manager: launches in the block belong to a phase."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def total(self, phase: str) -> int:
        """Launches of a phase."""
        return sum(self.counts.get(phase, Counter()).values())

    def _count(self, name: str) -> None:
        self.counts.setdefault(self.phase, Counter())[name] += 1


def count(model_config: ModelConfig) -> Launches:
    """The launches of one step, the second: the first allocates what stays. On the CPU, with TRITON_INTERPRET=1.

    Args:
        model_config: of which the number of layers is taken.
    """
    narrow = replace(model_config, **NARROW)
    config = training(Case("hybrid", 16, 4), steps=9, compile=False, cuda_graph="on", kernels="triton")
    config = replace(config, mixed_precision=False)
    trainer = random_trainer(config, narrow, World(0, 1, torch.device("cpu")))
    trainer.micro_batches.has_fixed_shapes = True  # as on a GPU
    step, launches = trainer.training_step, Launches()
    forward, backward, update = step.forward, torch.Tensor.backward, step._update  # noqa: SLF001

    def within(phase: str, function: Any) -> Any:
        def run(*args: Any) -> Any:
            with launches.during(phase):
                return function(*args)

        return run

    with Launches():
        trainer.train_step(trainer.loader.load(0))
    trainer.step = 1
    rows = trainer.loader.load(trainer.step)
    with (
        patch.object(step, "forward", within("forward", forward)),
        patch.object(torch.Tensor, "backward", within("backward", backward)),
        patch.object(step, "_update", within("update", update)),
        launches,
    ):
        trainer.train_step(rows)
    return launches


def run(config: LaunchesConfig) -> None:
    """Count, and print the launches of each phase. Exit status 1 if the bar is broken.

    Raises:
        InputError: there is no such model.
    """
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    model_config = ModelConfig.from_json(config.config_file)
    launches = count(model_config)
    totals = {phase: launches.total(phase) for phase in PHASES}
    bar = BAR * model_config.num_hidden_layers // 12
    if config.json:
        print(json.dumps({"launches": launches.counts, "totals": totals, "total": sum(totals.values()), "bar": bar}))
    else:
        for phase in PHASES:
            print(f"{phase}: {totals[phase]}")
            for name, times in launches.counts.get(phase, Counter()).most_common():
                print(table_row((f"  {name}", str(times)), (60, 6)))
        print(f"in all: {sum(totals.values())}, allowed {bar}")
    if sum(totals.values()) > bar:
        print(f"{sum(totals.values())} launches, {bar} allowed", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_command(LaunchesConfig, run)
