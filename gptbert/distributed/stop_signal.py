"""Signals that ask a run to save and stop: Ctrl-C, and what batch systems send before they kill."""

import itertools
import os
import signal
import threading
from types import FrameType
from typing import Self

import torch
from torch import Tensor

from gptbert.distributed.world import World

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Ctrl-C; SLURM's end, torchrun's end; SLURM's warning


class StopSignal:
    """Whether this process was asked to stop while the context was entered, and what the ranks make of that together.

    The first signal is only remembered, and its receipt said on the screen; a second Ctrl-C interrupts at once. Of the
    other signals batch systems may send several.

    Attributes:
        received: the first signal, or None.
    """

    def __init__(self, world: World) -> None:
        self.received: signal.Signals | None = None
        self._world = world
        self._totals: list[tuple[Tensor, torch.cuda.Event]] = []  # on their way from the GPU
        # where they arrive, in turns; made once, since to make pinned memory waits for the GPU
        self._arrivals = itertools.cycle(
            [torch.zeros((), dtype=torch.int64, pin_memory=True) for _ in range(2)]
            if world.device.type == "cuda" and world.world_size > 1
            else []
        )

    def requests(self) -> Tensor:
        """1 or 0, an int64 scalar on the device, to be added up over the ranks."""
        return torch.full((), int(self.received is not None), dtype=torch.int64, device=self._world.device)

    def should_stop(self, total: Tensor) -> bool:
        """Whether to stop at this step's end: the same on every rank, which must call it once a step.

        Args:
            total: of this step's `requests`, over all ranks. On a GPU the answer comes from the step before, whose
                total has arrived by now, so that the host need not wait.
        """
        if self._world.world_size == 1:
            return self.received is not None
        if total.device.type == "cpu":
            return total.item() > 0
        on_host = next(self._arrivals).copy_(total, non_blocking=True)
        self._totals.append((on_host, torch.cuda.current_stream().record_event()))
        if len(self._totals) == 1:
            return False
        previous, arrived = self._totals.pop(0)
        arrived.synchronize()
        return previous.item() > 0

    @property
    def received_name(self) -> str:
        """Of the first signal; where another process got it, that much."""
        return self.received.name if self.received else "a signal to another process"

    def __enter__(self) -> Self:
        self._handlers = {}
        if threading.current_thread() is threading.main_thread():  # no other may
            self._handlers = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None and self._world.world_size > 1:
            return  # this process is about to say why it ends, which torchrun's SIGTERM must not cut short
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is None:
            self.received = signal.Signals(number)
            if self._world.is_main:  # not by way of sys.stderr, which may be in the middle of a line
                os.write(2, f"\n{self.received.name}: saving a checkpoint at the next step, then stopping\n".encode())
