"""Triton's interpreter without the work that has no effect, which takes most of its time."""

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

# names of the interpreter's functions from Triton's types to NumPy's, and for the replacement of an operation
_NUMPY_TYPE, _PATCH = "_get_np_dtype", "_patch_attr"


def leave_out_dead_work() -> None:
    """Make this process's interpreter skip what changes no result. Needs TRITON_INTERPRET, set before.

    1. Each integer addition and product is also computed in int64, for an assertion that the interpreter never makes.
    2. Each call of a device function replaces Triton's language again, which the launch has already done. A function's
       first call still does, since its module may name another part of the language.
    3. Each result makes its type, its shape and a table of NumPy's types anew. There are few types, so each keeps its
       own: its blocks, the shape of their tensors, and its NumPy type.
    4. Operands of equal types or shapes are cast and broadcast nevertheless, in dozens of calls; and each operation of
       the language is called through two others.

    Names of the interpreter that a version of Triton does not have are left alone.
    """
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    core: Any = importlib.import_module("triton.language.core")
    builder: Any = getattr(interpreter, "interpreter_builder", None)
    options: Any = getattr(builder, "options", None)
    if getattr(options, "sanitize_overflow", False) and not getattr(options, "debug", True):
        builder.options = dataclasses.replace(options, sanitize_overflow=False)
    function: Any = getattr(interpreter, "InterpretedFunction", None)
    if hasattr(function, "rewrite") and not hasattr(function, "replacing_call"):
        function.replacing_call, function.__call__ = function.__call__, _call
    if not hasattr(core.block_type, "is_kept"):
        core.block_type.is_kept = True
        _keep_blocks(core.block_type, core.constexpr)
        _keep_shapes(core.tensor)
        numpy_type = getattr(interpreter, _NUMPY_TYPE, None)
        if numpy_type:
            setattr(interpreter, _NUMPY_TYPE, _kept_in_its_argument(numpy_type))
        semantic: Any = getattr(interpreter, "interpreter_semantic", None)
        if hasattr(semantic, "broadcast_impl_value") and hasattr(semantic, "binary_op_type_checking_impl"):
            _broadcast_what_differs(semantic, core)
            _cast_what_differs(semantic, core)
        if semantic and hasattr(interpreter, _PATCH):
            setattr(interpreter, _PATCH, functools.partial(_patch_directly, semantic))


def _call(function: Any, *args: Any, **kwargs: Any) -> Any:
    if getattr(function, "was_called", False):
        return function.rewrite()(*args, **kwargs)
    function.was_called = True
    return function.replacing_call(*args, **kwargs)


def _keep_blocks(block_type: Any, constexpr: Any) -> None:
    make = block_type.__init__

    def new(cls: Any, element_ty: Any, shape: Any) -> Any:
        sizes = tuple([size.value if isinstance(size, constexpr) else size for size in shape])
        blocks = element_ty.__dict__.setdefault("kept_blocks", {})
        if sizes not in blocks:
            block = object.__new__(cls)
            make(block, element_ty, shape)
            block.kept_sizes = sizes
            blocks[sizes] = block
        return blocks[sizes]

    block_type.__new__, block_type.__init__ = new, lambda *_: None


def _keep_shapes(tensor: Any) -> None:
    make = tensor.__init__

    def init(self: Any, handle: Any, of_type: Any) -> None:
        kept = of_type.__dict__.get("kept_shape")
        if kept is None:
            make(self, handle, of_type)
            of_type.kept_shape = {name: value for name, value in self.__dict__.items() if name != "handle"}
        else:
            self.__dict__.update(kept, handle=handle)

    tensor.__init__ = init


def _broadcast_what_differs(semantic: Any, core: Any) -> None:
    own = semantic.broadcast_impl_value

    def broadcast(lhs: Any, rhs: Any) -> tuple[Any, Any]:
        if lhs.type is rhs.type:
            return lhs, rhs
        left, right = (operand.type.__dict__.get("kept_sizes", ()) for operand in (lhs, rhs))
        if not left or len(left) != len(right):  # scalars, which become blocks, and other ranks
            return own(lhs, rhs)
        sizes = tuple(map(max, left, right))
        if any(1 < size < wanted for size, wanted in zip(left + right, sizes * 2, strict=True)):  # a mistake
            return own(lhs, rhs)
        return reach(lhs, left, sizes), reach(rhs, right, sizes)

    def reach(operand: Any, sizes: tuple[int, ...], wanted: tuple[int, ...]) -> Any:
        if sizes == wanted:
            return operand
        wider = semantic.builder.create_broadcast(operand.handle, wanted)
        return core.tensor(wider, core.block_type(operand.type.scalar, list(wanted)))

    semantic.broadcast_impl_value = broadcast


def _cast_what_differs(semantic: Any, core: Any) -> None:
    own = semantic.binary_op_type_checking_impl

    def check(lhs: Any, rhs: Any, *allowed: bool, **more: bool) -> tuple[Any, Any]:
        # two tensors, and no division, whose operands may be cast also if they are of one type
        if isinstance(lhs, core.tensor) and isinstance(rhs, core.tensor) and len(allowed) <= 2 and not more:
            element = lhs.type.scalar
            if element is rhs.type.scalar and not element.is_ptr():
                return semantic.broadcast_impl_value(lhs, rhs)
        return own(lhs, rhs, *allowed, **more)

    semantic.binary_op_type_checking_impl = check


def _patch_directly(semantic: Any, holder: Any, name: str, member: Any, _builder: Any, scope: Any) -> None:
    function = getattr(member, "__wrapped__", member)

    def call(*args: Any, _semantic: Any = None, **kwargs: Any) -> Any:
        return function(*args, **kwargs, _semantic=semantic)

    scope.set_attr(holder, name, call)


def _kept_in_its_argument(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def kept(dtype: Any) -> Any:
        found = dtype.__dict__.get("kept_numpy_type")
        if found is None:
            found = dtype.kept_numpy_type = function(dtype)
        return found

    return kept
