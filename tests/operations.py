"""What PyTorch does while a block runs, operation by operation, inside our own operations too."""

from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear")


class Operations(TorchDispatchMode):
    """Hand every operation to a function before it runs.

    Args:
        look: takes the operation's name, such as "aten::mm.out", and the tensors among its arguments.
    """

    def __init__(self, look):
        super().__init__()
        self.look = look

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.name()
        self.look(name, [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)])
        own = OPDEFS.get(name.split(".")[0])
        if own is None:
            return function(*args, **kwargs)
        with self:  # registered with torch.library.custom_op, so that its own operations are Python's
            return own._init_fn(*args, **kwargs)


def is_product(name):
    """Whether an operation of this name multiplies matrices."""
    return name.removeprefix("aten::").split(".")[0] in PRODUCTS
