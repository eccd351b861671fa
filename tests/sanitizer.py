"""Triton's interpreter with every address checked: lanes of loads and stores lie in a tensor given to the launch."""

from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import pytest
import torch


@contextmanager
def checked_addresses():
    """Context manager: yields a list that collects faults, and counts what it looked at in `seen`."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    own = executor._init_args_hst, builder.create_masked_load, builder.create_masked_store, builder.create_gather
    ranges, faults = [], Faults()

    def start(self, args, kwargs):
        moved = own[0](self, args, kwargs)
        tensors = [getattr(arg, "base", arg) for arg in (*moved[0], *moved[1].values())]
        tensors = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
        ranges[:] = [(tensor.data_ptr(), tensor.data_ptr() + span(tensor)) for tensor in tensors]
        return moved

    def look(kind, pointers, mask):
        size = max(1, (getattr(pointers.dtype.scalar, "element_ty", pointers.dtype).primitive_bitwidth + 7) // 8)
        at = np.asarray(pointers.data).astype(np.uint64).reshape(-1)
        if mask is not None:
            at = at[np.broadcast_to(np.asarray(mask.data), np.shape(pointers.data)).reshape(-1).astype(bool)]
        faults.seen += at.size
        inside = np.zeros(at.shape, bool)
        for low, end in ranges:
            inside |= (at >= low) & (at + np.uint64(size) <= end)
        if not inside.all() or (at % np.uint64(size)).any():
            faults.append(f"{kind} of {size} bytes")

    def load(self, pointers, mask, other, *rest):
        look("load", pointers, mask)
        return own[1](self, pointers, mask, other, *rest)

    def store(self, pointers, value, mask, *rest):
        look("store", pointers, mask)
        return own[2](self, pointers, value, mask, *rest)

    def gather(self, source, indices, axis):
        if (indices.data < 0).any() or (indices.data >= source.data.shape[axis]).any():
            faults.append("gather")
        return own[3](self, source, indices, axis)

    looking = {"create_masked_load": load, "create_masked_store": store, "create_gather": gather}
    with patch.object(executor, "_init_args_hst", start), patch.multiple(builder, **looking):
        yield faults


class Faults(list):
    """What went wrong; `seen` is the number of addresses."""

    seen = 0


def span(tensor):
    """Bytes from a tensor's first element to the end of its last."""
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()
