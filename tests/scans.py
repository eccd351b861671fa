"""Faster scans for Triton's interpreter."""

import numpy as np


def scan_by_doubling(scan, inputs):
    """The interpreter's `ScanOps.generic_scan` in log₂(n) vectorized steps instead of n sequential ones."""
    arrays, distance = [tensor.handle.data for tensor in inputs], 1
    while distance < len(arrays[0]):
        before = [np.roll(array, distance) for array in arrays]
        operands = zip([*before, *arrays], [*inputs, *inputs], strict=True)
        combined = scan.combine_fn.fn(*(scan.to_tensor(array, tensor.dtype) for array, tensor in operands))
        combined = combined if isinstance(combined, tuple) else (combined,)
        is_first = np.arange(len(arrays[0])) < distance
        arrays = [np.where(is_first, a, b.handle.data) for a, b in zip(arrays, combined, strict=True)]
        distance *= 2
    return [scan.to_tensor(array, tensor.dtype) for array, tensor in zip(arrays, inputs, strict=True)]
