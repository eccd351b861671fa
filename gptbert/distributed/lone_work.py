"""Work of the main rank alone, such as a save, for which the others wait while its process lives, however long."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist

_PATIENCE = timedelta(seconds=1)  # between looks at the signs of life; nccl's threads use the store in between
_SIGNS = "signs of life"


class LoneWork:
    """The main rank shows signs of life in the store, and the others count `--timeout` from the last of them.

    A collective operation would end the run once `--timeout` has passed, with work that is only slow.

    Args:
        store: of all ranks, for this alone.
        is_main: whether this is the main rank.
        timeout: `--timeout`, in seconds.
    """

    def __init__(self, store: dist.Store, timeout: float, *, is_main: bool) -> None:
        self._store, self._timeout, self._is_main = store, timeout, is_main
        self._count = 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Context manager around the main rank's work, which ends on the others when it does there; all enter it.

        Raises:
            torch.distributed.DistStoreError: the main rank shows no sign of life.
        """
        self._count += 1
        end = f"end {self._count}"
        if not self._is_main:
            yield
            self._wait(end)
            return
        ended = threading.Event()
        living = threading.Thread(target=self._live, args=(ended,), name="lone work", daemon=True)
        living.start()
        try:
            yield
        finally:
            ended.set()
            living.join()
            self._store.set(end, "")

    def _live(self, ended: threading.Event) -> None:
        while not ended.wait(self._timeout / 4):
            self._store.add(_SIGNS, 1)

    def _wait(self, end: str) -> None:
        """From another thread, since the main rank's process may have the store: one that hangs never answers."""
        heard = [time.monotonic()]
        watching = threading.Thread(target=self._watch, args=(end, heard), name="lone work", daemon=True)
        watching.start()
        while watching.is_alive():
            watching.join(_PATIENCE.total_seconds())
            if watching.is_alive() and time.monotonic() - heard[-1] > self._timeout:
                raise dist.DistStoreError("no sign of life from the main process")

    def _watch(self, end: str, heard: list[float]) -> None:
        """Return at the end, or once the store is lost, which the next collective operation tells."""
        seen = 0
        with suppress(dist.DistError):
            while True:
                if (signs := self._store.add(_SIGNS, 0)) != seen:
                    seen = signs
                    heard.append(time.monotonic())
                with suppress(dist.DistStoreError):
                    self._store.wait([end], _PATIENCE)
                    return
