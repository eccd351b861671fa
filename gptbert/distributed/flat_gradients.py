"""All gradients in one buffer, where they stay, summed over ranks in a few large pieces."""

import hashlib
from collections.abc import Collection, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gptbert.distributed.agreement import check_same
from gptbert.distributed.world import World

_ALIGNMENT = 32  # elements, 128 bytes: a parameter's gradient begins at a cache line, as an allocation of its own would
_PIECE = 2**24  # elements, 64 MB in fp32: enough to use a network's whole rate, and a few pieces to overlap copies with

_OTHER_ORDER = (
    "the processes have their gradients in different orders, as if they had different models or fused operations; "
    "--cuda_graph off needs no common order"
)


class FlatGradients:
    """The gradients of parameters as views of one fp32 buffer, which autograd adds to.

    For CUDA graphs, which record addresses. They must not be set to None: `zero_` takes the place of
    `Optimizer.zero_grad`.

    Attributes:
        buffer: [elements, with padding] fp32, zeros at first.

    Args:
        params: fp32, on the rank's device, in the same order on every rank; their `grad` is set.
        world: the ranks to sum over.
        dtype: fp32, or bf16 to send half the bytes; sums are rounded to it on the way.
        overwritten: parameters whose gradients every backward overwrites, so that nothing need clear them.

    Raises:
        SharedError: on every rank, where ranks place their gradients in different orders; every rank must make its own.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        world: World,
        dtype: torch.dtype = torch.float32,
        overwritten: Collection[Tensor] = (),
    ) -> None:
        unread, given = set(overwritten), list(params)
        # by dimensions, so that weights packed together have neighbors' places
        order = sorted(range(len(given)), key=lambda index: (given[index] in unread, given[index].ndim))
        params = [given[index] for index in order]
        # a sum of different parameters' gradients would raise no error
        places = repr([(index, given[index].shape) for index in order])
        check_same({_OTHER_ORDER: hashlib.sha256(places.encode()).hexdigest()}, world)
        spaces = [-(-param.numel() // _ALIGNMENT) * _ALIGNMENT for param in params]
        self.buffer = torch.zeros(sum(spaces), dtype=torch.float32, device=world.device)
        added = sum(space for param, space in zip(params, spaces, strict=True) if param not in unread)
        self._added = self.buffer[:added]
        for param, space in zip(params, self.buffer.split(spaces), strict=True):
            param.grad = space[: param.numel()].view_as(param)
        self._world = world
        self._dtype = dtype

    def zero_(self) -> None:
        """Set all gradients to zero, but for those that the next backward overwrites."""
        self._added.zero_()

    def all_reduce(self) -> None:
        """Sum over all ranks, in place and without a device sync; every rank must call it."""
        if self._world.world_size == 1:
            return
        pieces = self.buffer.split(_PIECE)
        sent = [piece.to(self._dtype) for piece in pieces]  # the pieces themselves in fp32
        works = [dist.all_reduce(each, async_op=True) for each in sent]
        for piece, received, work in zip(pieces, sent, works, strict=True):
            work.wait()
            if received is not piece:
                piece.copy_(received)
