"""Seconds of the parts of a trainer's step; nested parts count only once, for the inner part."""

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from benchmarks import machine
from gptbert.data.loader import BatchLoader
from gptbert.data.prefetcher import Prefetcher
from gptbert.distributed.world import World
from gptbert.model import gptbert as model_module
from gptbert.training import step as step_module
from gptbert.training.step import TrainingStep
from kernels.masked_cross_entropy import op as cross_entropy_op

PARTS = ("waiting", "masking", "forward", "cross-entropy", "backward", "reduction", "optimizer", "rest")


class Stopwatch:
    """Use `installed` around a trainer's life, and `step` around each of its steps, which must not be recorded.

    Attributes:
        rows: seconds to build each step's rows, on the background thread; "waiting" is the step's wait for them.
    """

    def __init__(self) -> None:
        self.rows: list[float] = []
        self._seconds: dict[str, float] = defaultdict(float)
        self._gradients_done: float | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Context manager: time the functions that are parts of the step."""
        parts = [
            ("waiting", Prefetcher, "get"),
            ("masking", BatchLoader, "batch"),
            ("forward", TrainingStep, "forward"),
            ("cross-entropy", model_module, "masked_cross_entropy"),
            ("cross-entropy", cross_entropy_op, "multiplied"),  # its backward
            ("reduction", World, "all_reduce_sum"),
            ("optimizer", step_module, "update_weights"),
        ]
        with ExitStack() as stack:
            for part, owner, name in parts:
                stack.enter_context(patch.object(owner, name, self._timed(part, getattr(owner, name))))
            stack.enter_context(patch.object(BatchLoader, "load", self._timed_rows(BatchLoader.load)))
            stack.enter_context(patch.object(Tensor, "backward", self._timed_backward(Tensor.backward)))
            stack.enter_context(patch.object(World, "wrap", self._watched_reduction(World.wrap)))
            yield

    def step(self, action: Callable[[], object]) -> tuple[float, dict[str, float]]:
        """Run one step; returns its seconds, and those of PARTS, whose sum it is."""
        self._seconds.clear()
        seconds = machine.seconds(action)
        parts = {part: self._seconds[part] for part in PARTS}
        parts["rest"] = seconds - sum(parts.values())
        return seconds, parts

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            machine.synchronize()
            inner, start = sum(self._seconds.values()), time.perf_counter()
            result = function(*args, **kwargs)
            machine.synchronize()
            seconds = time.perf_counter() - start
            self._seconds[part] += seconds - (sum(self._seconds.values()) - inner)
            return result

        return timed

    def _timed_rows(self, load: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(load)
        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            result = load(*args)
            self.rows.append(time.perf_counter() - start)
            return result

        return timed

    def _timed_backward(self, backward: Callable[..., None]) -> Callable[..., None]:
        """Once this rank's gradients are complete, the rest of a backward is reduction."""

        @functools.wraps(backward)
        def timed(*args: Any, **kwargs: Any) -> None:
            machine.synchronize()
            self._gradients_done = None
            inner, start = sum(self._seconds.values()), time.perf_counter()
            backward(*args, **kwargs)
            machine.synchronize()
            end = time.perf_counter()
            done = self._gradients_done or end
            self._seconds["backward"] += done - start - (sum(self._seconds.values()) - inner)
            self._seconds["reduction"] += end - done

        return timed

    def _watched_reduction(self, wrap: Callable[..., Any]) -> Callable[..., Any]:
        def reduce(group: torch.distributed.ProcessGroup, bucket: GradBucket) -> torch.futures.Future[Tensor]:
            if bucket.is_last():
                machine.synchronize()
                self._gradients_done = time.perf_counter()
            return allreduce_hook(group, bucket)

        @functools.wraps(wrap)
        def wrapped(*args: Any) -> Any:
            model = wrap(*args)
            if isinstance(model, DistributedDataParallel):
                model.register_comm_hook(None, reduce)
            return model

        return wrapped
