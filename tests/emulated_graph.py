"""CUDA graphs on a CPU: a recording of operations with their tensors and numbers, replayed without any Python of ours.

As with a real one, a recording has no effect, and a replay repeats what was recorded: the same tensors, wherever Python
has put others by then, and the same numbers. Reading a value during a recording is an error.
"""

import importlib
from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from gptbert.training import step
from gptbert.training.cuda_graph import Recorder

READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"}


class EmulatedRecorder(Recorder):
    """A `Recorder` that is on where there is no GPU.

    Attributes:
        replays: their number so far.
    """

    def __init__(self, device: torch.device, rank: int | None = None) -> None:
        super().__init__(device, rank)
        self.is_on = True
        self.replays = 0

    def run(self, function: Callable[[], None]) -> None:
        function()

    def wait(self) -> None:
        pass

    def _capture(self, function: Callable[[], None]) -> Callable[[], None]:
        operations = _Operations()
        try:
            with operations:
                function()
        finally:
            operations.undo()

        def replay() -> None:
            self.replays += 1
            operations.replay()

        return replay


class _Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._operations = []
        self._before: dict[int, tuple[Tensor, Tensor]] = {}  # storages from outside that were written, and copies
        self._made: set[int] = set()  # storages made by the recording
        self._depth = 0  # of operations whose insides are not recorded apart

    def __enter__(self):
        """Triton's launches outside of operations are recorded without running: what they would write is unknown."""
        executor = importlib.import_module("triton.runtime.interpreter").GridExecutor
        launch = executor.__call__

        def recorded_launch(kernel, *args, **kwargs):
            if self._depth:
                return launch(kernel, *args, **kwargs)
            return self._operations.append((partial(launch, kernel), args, kwargs, []))

        self._launches = patch.object(executor, "__call__", recorded_launch)
        self._launches.start()
        return super().__enter__()

    def __exit__(self, *error):
        self._launches.stop()
        super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.name() in READS:
            raise RuntimeError(f"{function.name()}: operation not permitted when stream is capturing")
        self._keep_what_is_written(function, args, kwargs)
        before = tree_map_only(Tensor, Tensor.detach, (args, kwargs))
        self._depth += 1
        try:
            result = function(*args, **kwargs)
        finally:
            self._depth -= 1
        inputs = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self._made |= {_storage(tensor) for tensor in made} - inputs
        if any(_storage(tensor) not in inputs for tensor in made) or function._schema.is_mutable:
            # others are views, of the same memory in replays; aliases, since an operation may change a tensor's shape
            self._operations.append((function, *before, [tensor.detach() for tensor in made]))
        return result

    def _keep_what_is_written(self, function, args, kwargs):
        names = [argument.name for argument in function._schema.arguments]
        values = dict(zip(names, args, strict=False)) | kwargs
        for argument in function._schema.arguments:
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            for tensor in tree_leaves(values.get(argument.name)):
                if isinstance(tensor, Tensor) and _storage(tensor) not in self._made | self._before.keys():
                    whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                    self._before[_storage(tensor)] = whole, whole.clone()

    def undo(self) -> None:
        """Restore what the recording has written outside its own memory."""
        for whole, before in self._before.values():
            whole.copy_(before)

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, made in self._operations:
            result = function(*args, **kwargs)
            for tensor, again in zip(made, _tensors(result), strict=True):
                if again.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr():
                    tensor.copy_(again)


def _tensors(result):
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def emulate(monkeypatch) -> None:
    """Make recorded steps use emulated graphs."""
    monkeypatch.setattr(step, "Recorder", EmulatedRecorder)
