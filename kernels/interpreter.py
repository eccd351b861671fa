"""Triton's interpreter without work that has no effect, which is more than half of its time."""

import dataclasses
import importlib
from typing import Any


def leave_out_dead_work() -> None:
    """Make this process's interpreter skip what changes no result. Needs TRITON_INTERPRET, set before.

    1. Each integer addition and product is also computed in int64, for an assertion that the interpreter never makes.
    2. Each call of a device function replaces Triton's language again, which the launch has already done. A function's
       first call still does, since its module may name another part of the language.

    Names of the interpreter that a version of Triton does not have are left alone.
    """
    interpreter = importlib.import_module("triton.runtime.interpreter")
    builder: Any = getattr(interpreter, "interpreter_builder", None)
    options: Any = getattr(builder, "options", None)
    if getattr(options, "sanitize_overflow", False) and not getattr(options, "debug", True):
        builder.options = dataclasses.replace(options, sanitize_overflow=False)
    function: Any = getattr(interpreter, "InterpretedFunction", None)
    if hasattr(function, "rewrite") and not hasattr(function, "replacing_call"):
        function.replacing_call, function.__call__ = function.__call__, _call


def _call(function: Any, *args: Any, **kwargs: Any) -> Any:
    if getattr(function, "was_called", False):
        return function.rewrite()(*args, **kwargs)
    function.was_called = True
    return function.replacing_call(*args, **kwargs)
