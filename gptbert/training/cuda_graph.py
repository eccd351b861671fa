"""CUDA graphs: a function's kernels, launched by the host once and replayed from then on.

A step of GPT-BERT has thousands of kernels, each of which takes the host 10 to 46 µs to launch; a replay is one launch.
A recorded function has no arguments and no result, reads and writes tensors that stay where they are, and never waits
for the device: kernels get the addresses and numbers of the recording at each replay.
"""

import gc
from collections.abc import Callable

import torch

from gptbert.errors import first_line
from gptbert.io.screen import log
from kernels.torch_private import end_failed_capture


class Recorder:
    """Records the functions of a run, on a stream of its own.

    A recording keeps the memory of what it computes on the way until it is dropped.

    Attributes:
        is_on: whether functions are recorded: on GPUs, until a recording fails.
        recorded: the names of those recorded so far.

    Args:
        device: of the tensors; on a CPU, functions run as they are.
        rank: of this process, where there are several: each says why its own recording failed.
    """

    def __init__(self, device: torch.device, rank: int | None = None) -> None:
        self.is_on = device.type == "cuda"
        self.recorded: list[str] = []
        self._who = "" if rank is None else f"rank {rank}: "
        self._failed: torch.cuda.CUDAGraph | None = None
        if self.is_on:
            self._stream = torch.cuda.Stream(device)

    def run(self, function: Callable[[], None]) -> None:
        """Run a function on the recordings' stream, where all that it does once (compiling, allocating) is done."""
        if not self.is_on:
            function()
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            function()
        torch.cuda.current_stream().wait_stream(self._stream)

    def wait(self) -> None:
        """Wait until the device has finished; before a recording is dropped."""
        torch.cuda.synchronize()

    def record(self, function: Callable[[], None], name: str) -> Callable[[], None] | None:
        """Record a function that `run` has run, without running it.

        Returns:
            The replay; None if it cannot be recorded: then a line says why, and nothing is recorded any more.
        """
        if not self.is_on:
            return None
        try:
            replay = self._capture(function)
        except RuntimeError as error:
            self.is_on = False
            reason = first_line(error.__context__ or error)  # the first error, not that of the recording's end
            what = f"--cuda_graph: {name} cannot be recorded ({reason})"
            log(f"{self._who}{what}; this run goes on without, in the same bits")
            return None
        self.recorded.append(name)
        return replay

    def _capture(self, function: Callable[[], None]) -> Callable[[], None]:
        gc.collect()  # of former steps, nothing is left that has memory or waits for another stream
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        try:
            # The outer context restores the stream, which torch.cuda.graph does not where a recording fails.
            # "thread_local": the thread that prepares rows allocates pinned memory meanwhile, which "global" forbids.
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                function()
        except RuntimeError:
            self._failed = graph  # PyTorch's allocator still refers to it
            end_failed_capture(self._stream.device_index, pool)
            raise
        return graph.replay


class Recorded:
    """A function that runs as it is at its first call, is recorded at its second, and is replayed from then on.

    Args:
        function: see above.
        name: what it is, for the line that says why it cannot be recorded.
        recorder: the run's.
    """

    def __init__(self, function: Callable[[], None], name: str, recorder: Recorder) -> None:
        self._function = function
        self._name = name
        self._recorder = recorder
        self._has_run = False
        self._replay: Callable[[], None] | None = None

    def __call__(self) -> None:
        """Run or replay it."""
        if self._replay is None and self._has_run:
            self._replay = self._recorder.record(self._function, self._name)
        if self._replay is None:
            self._recorder.run(self._function)
        else:
            self._replay()
        self._has_run = True
