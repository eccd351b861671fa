"""Values for the next steps, computed ahead on a thread."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from queue import SimpleQueue
from typing import Generic, Self, TypeVar

T = TypeVar("T")
_POLLING = 0.2  # seconds between calls of `while_waiting`
_PATIENCE = 2.0  # seconds that a thread may take to end


class Prefetcher(Generic[T]):
    """Computes a function of the step a few steps ahead on its own thread; the context manager ends the thread.

    A thread that hangs (a disk that does not answer) is left behind, and does not keep the process from ending.

    Args:
        function: pure; called with consecutive steps.
        first_step: the first step that will be requested.
        last_step: steps from here on are not computed.
        depth: steps computed ahead.
    """

    def __init__(self, function: Callable[[int], T], first_step: int, last_step: int, depth: int = 4) -> None:
        self._function = function
        self._last_step = last_step
        self._depth = depth
        self._pending: dict[int, Future[T]] = {}
        self._queue: SimpleQueue[tuple[Future[T], int] | None] = SimpleQueue()
        self._worker = threading.Thread(target=self._work, name="rows", daemon=True)
        self._worker.start()
        self._submit_from(first_step)

    def get(self, step: int, while_waiting: Callable[[], None] = lambda: None) -> T:
        """The function's value at `step`; waits if it is not ready, and re-raises the function's exceptions.

        Args:
            step: the next one.
            while_waiting: called a few times a second until the value is ready; may raise.
        """
        self._submit_from(step)
        while not wait([self._pending[step]], _POLLING).done:
            while_waiting()
        return self._pending.pop(step).result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for future in self._pending.values():
            future.cancel()
        self._queue.put(None)
        self._worker.join(_PATIENCE)

    def _work(self) -> None:
        while task := self._queue.get():
            future, step = task
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(self._function(step))
                except BaseException as error:  # noqa: BLE001  re-raised by `get`
                    future.set_exception(error)

    def _submit_from(self, step: int) -> None:
        for ahead in range(step, min(step + self._depth, self._last_step)):
            if ahead not in self._pending:
                self._pending[ahead] = Future()
                self._queue.put((self._pending[ahead], ahead))
