"""Bytes and launches of kernels in Triton's interpreter, and the bars of a job.

Every load and store of an interpreted program goes through one builder; a lane counts if its mask is true, an atomic as
a load and a store. These are the programs' memory requests: caches may serve some of them, and PyTorch operations
around the kernels (sums over rows, checks of labels) are not included.
"""

import importlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Self
from unittest.mock import patch

import numpy as np


@dataclass
class Traffic:
    """Traffic of one kernel.

    Attributes:
        launches: number of launches.
        loaded: bytes loaded.
        stored: bytes stored.
    """

    launches: int = 0
    loaded: int = 0
    stored: int = 0


class Counted:
    """Context manager: counts loads and stores of interpreted kernels; `.kernels`, by the kernel's name."""

    def __init__(self) -> None:
        self.kernels: dict[str, Traffic] = {}
        self._running = Traffic()
        self._patches = ExitStack()

    @property
    def total(self) -> int:
        """Bytes loaded and stored by all kernels."""
        return sum(traffic.loaded + traffic.stored for traffic in self.kernels.values())

    @property
    def launches(self) -> int:
        """Launches of all kernels."""
        return sum(traffic.launches for traffic in self.kernels.values())

    def __enter__(self) -> Self:
        interpreter = importlib.import_module("triton.runtime.interpreter")
        builder, run = interpreter.interpreter_builder, interpreter.GridExecutor.__call__

        def counting_run(executor: Any, *args: Any, **kwargs: Any) -> None:
            self._running = self.kernels.setdefault(executor.fn.__name__, Traffic())
            self._running.launches += 1
            run(executor, *args, **kwargs)

        # unmasked and descriptor accesses all end in the masked ones
        methods: dict[str, Callable[..., tuple[int, int]]] = {
            "create_masked_load": lambda pointers, mask, *_: (_bytes(pointers, mask), 0),
            "create_masked_store": lambda pointers, _, mask, *__: (0, _bytes(pointers, mask)),
            "create_atomic_rmw": lambda _, pointers, __, mask, *___: (_bytes(pointers, mask),) * 2,
            "create_atomic_cas": lambda pointers, *_: (_bytes(pointers, None),) * 2,
        }
        for name, measure in methods.items():
            self._patches.enter_context(patch.object(builder, name, self._counting(getattr(builder, name), measure)))
        self._patches.enter_context(patch.object(interpreter.GridExecutor, "__call__", counting_run))
        return self

    def __exit__(self, *exception: object) -> None:
        self._patches.close()

    def _counting(self, access: Callable[..., Any], measure: Callable[..., tuple[int, int]]) -> Callable[..., Any]:
        def counting(*args: Any, **kwargs: Any) -> Any:
            loaded, stored = measure(*args, *kwargs.values())
            self._running.loaded += loaded
            self._running.stored += stored
            return access(*args, **kwargs)

        return counting


def _bytes(pointers: Any, mask: Any) -> int:
    lanes = pointers.data.size if mask is None else int(np.count_nonzero(mask.data))
    return lanes * max(1, pointers.get_element_ty().primitive_bitwidth // 8)


@dataclass
class CountedJob:
    """A job's bytes, and its bars.

    Attributes:
        name: what runs.
        moved: bytes that the kernels load and store.
        fewest: minimum of bytes.
        bar: limit of moved over fewest.
        launches: of all kernels.
        launch_bar: limit of launches, or None.
        liger: bytes that Liger-Kernel moves for the same job, or None if it has no equivalent.
        liger_bar: limit of moved over Liger-Kernel's, or None.
        parameters: number that LAMB updates, or None.
        kernels: traffic of each kernel.
    """

    name: str
    moved: int
    fewest: int
    bar: float
    launches: int
    launch_bar: int | None = None
    liger: int | None = None
    liger_bar: float | None = None
    parameters: int | None = None
    kernels: dict[str, Traffic] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Bytes moved over the minimum."""
        return self.moved / self.fewest

    @property
    def liger_ratio(self) -> float | None:
        """Bytes moved over Liger-Kernel's."""
        return self.moved / self.liger if self.liger else None

    def broken_bars(self) -> list[str]:
        """One line per bar that does not hold."""
        broken = []
        if self.ratio < 1:
            broken.append(f"{self.name}: {self.moved} bytes, fewer than are possible: something did not run")
        if self.ratio > self.bar:
            broken.append(f"{self.name}: {self.ratio:.4f} of the fewest bytes, at most {self.bar} allowed")
        if self.launch_bar is not None and self.launches > self.launch_bar:
            broken.append(f"{self.name}: {self.launches} launches, at most {self.launch_bar} allowed")
        if self.liger_bar is not None and self.liger_ratio is not None and self.liger_ratio > self.liger_bar:
            broken.append(f"{self.name}: {self.liger_ratio:.3f} of Liger-Kernel's, at most {self.liger_bar} allowed")
        return broken
