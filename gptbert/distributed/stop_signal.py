"""Signals that ask a run to save and stop: Ctrl-C, a closed terminal, those that batch systems send before SIGKILL."""

import contextlib
import itertools
import os
import signal
import threading
from types import FrameType
from typing import Any, Self

import torch
from torch import Tensor

from gptbert.distributed.world import World

# Ctrl-C; SLURM's end, torchrun's end; SLURM's warning; the end of a terminal or of the connection to it
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class StopRequested(Exception):  # noqa: N818  not an error
    """The run was asked to stop; raised on all ranks at the same place."""


class StopSignal:
    """Records a request to stop while the context is entered, and makes all ranks stop at the same place.

    The first signal is only recorded and acknowledged on the screen; a second Ctrl-C interrupts at once. Repeats of
    the other signals are ignored, since batch systems may send several. A SIGHUP that is ignored already, as `nohup`
    arranges it, stays so.

    Attributes:
        received: the first signal, or None.
    """

    def __init__(self, world: World) -> None:
        self.received: signal.Signals | None = None
        self._world = world
        self._totals: list[tuple[Tensor, Any]] = []  # copies from the GPU in flight, and the event of each
        # their two destinations, alternating; allocated once, since allocating pinned memory syncs with the GPU
        self._arrivals = itertools.cycle(
            [torch.zeros((), dtype=torch.int64, pin_memory=True) for _ in range(2)]
            if world.device.type == "cuda" and world.world_size > 1
            else []
        )

    def requests(self) -> Tensor:
        """1 or 0, an int64 scalar on the device, to be summed over the ranks."""
        return torch.full((), int(self.received is not None), dtype=torch.int64, device=self._world.device)

    def note(self, total: Tensor) -> None:
        """Take the sum of this step's `requests` over all ranks; a GPU's starts on its way to the host."""
        if self._world.world_size == 1:
            return
        arrived = None
        if total.device.type == "cuda":
            total = next(self._arrivals).copy_(total, non_blocking=True)
            arrived = torch.cuda.current_stream().record_event()
        self._totals = [*self._totals[-1:], (total, arrived)]

    def should_stop(self) -> bool:
        """Whether to stop at this step's end, the same on every rank, after `note` of the step.

        On a GPU the answer is that of the step before, whose total has arrived by now, without a device sync.
        """
        if self._world.world_size == 1:
            return self.received is not None
        newest, arrived = self._totals[-1]
        if arrived is None:
            return newest.item() > 0
        if len(self._totals) == 1:
            return False
        previous, arrived = self._totals[0]
        arrived.synchronize()
        return previous.item() > 0

    def raise_if_asked(self) -> None:
        """Between the parts of long work other than steps; every rank must call it.

        Raises:
            StopRequested: some rank was asked to stop; on a GPU with several ranks, before the previous call.
        """
        self.note(self._world.all_reduce_sum(self.requests()))
        if self.should_stop():
            raise StopRequested

    def raise_if_received(self) -> None:
        """While this process waits for something that the other ranks may have.

        Raises:
            StopRequested: this process was asked to stop.
        """
        if self.received is not None:
            raise StopRequested

    @property
    def stops_before_steps(self) -> bool:
        """Whether all ranks can learn of a request before a step, and not only at its end.

        A single process, and processes on CPUs; on several GPUs the others' step may be in their queues already.
        """
        return self._world.world_size == 1 or self._world.device.type == "cpu"

    @property
    def received_name(self) -> str:
        """Name of the first signal, or a note that another process received it."""
        return self.received.name if self.received else "a signal to another process"

    def __enter__(self) -> Self:
        self._handlers = {}
        if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
            has_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            numbers = [number for number in SIGNALS if not (has_nohup and number == signal.SIGHUP)]
            self._handlers = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None and self._world.world_size > 1:
            return  # keep handling SIGTERM: torchrun's must not end this process before it has reported its error
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is None:
            self.received = signal.Signals(number)
            if self._world.is_main:
                line = f"\n{self.received.name}: saving a checkpoint at the next step, then stopping\n"
                with contextlib.suppress(OSError):  # the screen may be gone
                    os.write(2, line.encode())  # not through sys.stderr, which is not reentrant
