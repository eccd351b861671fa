"""Observes every PyTorch operation in a block, including those inside our own operations."""

from contextlib import ExitStack

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear")
FROM_NUMBERS = (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy)
PLACES = (Tensor.__getitem__, Tensor.__setitem__)


class Operations:
    """Context manager: calls a function before every operation.

    Args:
        look: called with the operation's name and the tensors among its arguments. Names are like "aten::mm.out"; or
            "from host" for a tensor created from Python numbers, or an index that is a list of them.
        closed: our own operations whose insides are not observed, such as "kernels::lamb_step".
    """

    def __init__(self, look, closed=()):
        self.look = look
        self.closed = closed

    def __enter__(self):
        self._modes = ExitStack()
        self._modes.enter_context(_Dispatched(self))
        self._modes.enter_context(_Called(self))

    def __exit__(self, *exception):
        self._modes.close()


class _Dispatched(TorchDispatchMode):
    def __init__(self, operations):
        super().__init__()
        self.operations = operations

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function.name()
        self.operations.look(name, [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)])
        own = OPDEFS.get(name)
        if own is None or name in self.operations.closed:
            return function(*args, **kwargs)
        with Operations(self.operations.look, self.operations.closed):
            return own._init_fn(*args, **kwargs)  # registered with torch.library.custom_op: its body is Python


class _Called(TorchFunctionMode):
    """Sees what never reaches the dispatcher."""

    def __init__(self, operations):
        super().__init__()
        self.operations = operations

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in FROM_NUMBERS and not isinstance(args[0], Tensor):
            self.operations.look("from host", [])
        if function in PLACES and any(isinstance(leaf, list) for leaf in _parts(args[1])):
            self.operations.look("from host", [])
        return function(*args, **(kwargs or {}))


def _parts(index):
    return index if isinstance(index, tuple) else (index,)


def is_product(name):
    """Whether an operation of this name is a matrix product."""
    return name.removeprefix("aten::").split(".")[0] in PRODUCTS
