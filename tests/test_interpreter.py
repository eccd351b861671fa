"""Triton's interpreter without dead work computes the same; the work that is left out is seen to be left out."""

import dataclasses

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from kernels.interpreter import leave_out_dead_work


@triton.jit
def _mixed(x, factor: tl.constexpr):
    return x * factor + (x >> 3)


@triton.jit
def _kernel(x_ptr, out_ptr, n: tl.constexpr):
    index = tl.arange(0, n)
    x = tl.load(x_ptr + index)
    tl.store(out_ptr + index, _mixed(_mixed(x, 3), 5) + tl.sum(x) + tl.cumsum(x))


def launched(monkeypatch):
    """Output of integers that wrap around, how often the language was replaced, and of products in int64."""
    replaced, wide, own, own_mul = [], [], interpreter._patch_lang, interpreter.InterpreterBuilder.create_mul
    with monkeypatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", lambda fn: (replaced.append(fn), own(fn))[1])
        patch.setattr(
            interpreter.InterpreterBuilder,
            "create_mul",
            lambda self, lhs, rhs: (wide.append(lhs.data.dtype == "int64"), own_mul(self, lhs, rhs))[1],
        )
        x = torch.arange(-8, 8, dtype=torch.int32) * 2**27
        out = torch.empty_like(x)
        _kernel[1,](x, out, 16)
    return out, len(replaced), sum(wide)


def test_results_are_the_same_with_less_work(monkeypatch):
    builder, function = interpreter.interpreter_builder, interpreter.InterpretedFunction
    quick = [launched(monkeypatch) for _ in range(2)][1]
    with monkeypatch.context() as patch:
        patch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=True))
        patch.setattr(function, "__call__", function.replacing_call)
        own = launched(monkeypatch)
    assert torch.equal(quick[0], own[0])
    assert quick[1:] == (1, 0)
    assert own[1] > 3, "for each call"
    assert own[2] == 2, "for each product"


def test_types_are_made_once(monkeypatch):
    """All but those of pointers, which each launch has anew."""
    launched(monkeypatch)
    made, own = [], tl.core.validate_block_shape
    monkeypatch.setattr(tl.core, "validate_block_shape", lambda shape: (made.append(shape), own(shape))[1])
    launched(monkeypatch)
    assert len(made) == 4, "two blocks for each pointer"


def test_blocks_differ_by_element_and_shape():
    one = tl.block_type(tl.int32, [tl.constexpr(4), 8])
    assert one == tl.block_type(tl.int32, (4, 8))
    assert one.shape == (4, 8)
    others = [tl.block_type(tl.int32, [8, 4]), tl.block_type(tl.uint32, [4, 8]), tl.block_type(tl.int32, [32])]
    assert one not in others
    assert len({block.name for block in (one, *others)}) == 4


def full(shape, value, dtype=tl.int32):
    return interpreter.interpreter_semantic.full(shape, value, dtype)


@pytest.mark.parametrize(
    ("left", "right"), [([4, 8], [4, 8]), ([4, 1], [1, 8]), ([4, 8], [4, 1]), ([8], [4, 8]), ([], [8]), ([8], [])]
)
@pytest.mark.parametrize("dtype", [tl.int32, tl.uint32, tl.float32])
def test_operands_meet_as_tritons_own_do(left, right, dtype):
    semantic, operands = interpreter.interpreter_semantic, (full(left, 3), full(right, 5, dtype))
    found = semantic.binary_op_type_checking_impl(*operands)
    own = type(semantic)(interpreter.interpreter_builder).binary_op_type_checking_impl(*operands)
    for ours, theirs in zip(found, own, strict=True):
        assert ours.type == theirs.type
        assert ours.handle.dtype == theirs.handle.dtype
        assert (ours.handle.data == theirs.handle.data).all()
        assert ours.handle.data.shape == theirs.handle.data.shape


def test_operands_of_one_type_are_neither_cast_nor_broadcast(monkeypatch):
    semantic = interpreter.interpreter_semantic
    for name in ("cast", "to_tensor", "scalar_constant"):
        monkeypatch.setattr(semantic, name, None)
    one = semantic.add(semantic.arange(0, 8), semantic.arange(0, 8), sanitize_overflow=False)
    monkeypatch.setattr(semantic.builder, "create_broadcast", None)
    assert semantic.mul(one, one, sanitize_overflow=False).handle.data[7] == 14**2


def test_shapes_that_do_not_meet_are_refused():
    with pytest.raises(ValueError, match="incompatible dimensions at index 0: 4 and 8"):
        interpreter.interpreter_semantic.add(full([4, 8], 1), full([8, 8], 1), sanitize_overflow=False)


def test_it_can_be_asked_for_twice_and_of_a_version_without_these_names(monkeypatch):
    before = interpreter.InterpretedFunction.__call__, interpreter.InterpretedFunction.replacing_call
    leave_out_dead_work()
    assert (interpreter.InterpretedFunction.__call__, interpreter.InterpretedFunction.replacing_call) == before
    monkeypatch.delattr(interpreter, "interpreter_builder")
    monkeypatch.delattr(interpreter, "InterpretedFunction")
    leave_out_dead_work()
