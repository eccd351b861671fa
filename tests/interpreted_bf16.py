"""bf16 in Triton's interpreter as a GPU computes it, so that checks in bf16 run on a CPU.

The interpreter keeps bf16 numbers as their 16 bits. It truncates fp32 to them, where a GPU rounds to the nearest, and
computes with the bits as if they were integers.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np


def to_fp32(bits: np.ndarray) -> np.ndarray:
    """The numbers of 16 bits each, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bf16(numbers: np.ndarray) -> np.ndarray:
    """The bits of the nearest bf16 numbers; of two as near, of the even one."""
    bits = np.asarray(numbers, dtype=np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16
    bits = np.where(np.isfinite(numbers), rounded, bits >> 16)
    return np.where(np.isnan(numbers), 0x7FC0, bits).astype(np.uint16)


@contextmanager
def bf16_as_on_gpus() -> Iterator[None]:
    """A block in which the interpreter casts to bf16, computes with it and multiplies matrices of it as a GPU does."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    language = importlib.import_module("triton.language")
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, compute, multiply = builder.cast_impl, builder.binary_op, builder.create_dot
    convert = builder.create_fp_to_fp

    def is_bf16(value: object) -> bool:
        return value.dtype.scalar == language.bfloat16

    def widened(value: object) -> object:
        return handle(to_fp32(value.data), language.float32) if is_bf16(value) else value

    def cast_rightly(self: object, value: object, target: object) -> object:
        if is_bf16(value) == (target.scalar == language.bfloat16):
            return cast(self, value, target)
        if is_bf16(value):
            return cast(self, widened(value), target)
        wide = cast(self, value, language.float32) if value.dtype.scalar != language.float32 else value
        return handle(to_bf16(wide.data), target.scalar)

    def convert_rightly(self: object, value: object, target: object, rounding: object) -> object:
        if is_bf16(value) or target.scalar == language.bfloat16:
            return cast_rightly(self, value, target)
        return convert(self, value, target, rounding)

    def compute_rightly(self: object, left: object, right: object, operation: object) -> object:
        if not (is_bf16(left) and is_bf16(right)):
            return compute(self, left, right, operation)
        result = operation(to_fp32(left.data), to_fp32(right.data))
        return handle(result if result.dtype == bool else to_bf16(result), language.bfloat16)

    def multiply_rightly(self: object, left: object, right: object, *others: object) -> object:
        return multiply(self, widened(left), widened(right), *others)

    with patch.multiple(
        builder,
        cast_impl=cast_rightly, create_fp_to_fp=convert_rightly, binary_op=compute_rightly, create_dot=multiply_rightly,
    ):  # fmt: skip
        yield
