"""The eval mode of a model, without dropout, for as long as it is needed."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.distributed.fsdp import FSDPModule


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Context manager: eval mode, and after the block, also after an exception, the mode from before.

    A sharded model then frees the weights of its root, which stay gathered after a forward without a backward.
    """
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
        if isinstance(model, FSDPModule):
            model.reshard()
