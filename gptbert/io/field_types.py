"""The fields of a dataclass of settings, as the command line gives them, where Python code gives them."""

import os
from collections.abc import Iterable
from numbers import Real
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from gptbert.errors import InputError

_EXPECTED = {int: "a whole number", float: "a number", bool: "True or False", str: "a text", Path: "a path"}


def settle(settings: Any) -> None:
    """Replace values of a frozen dataclass by those of its fields' types.

    Texts become paths, lists and single values tuples, and numbers of other kinds, such as numpy's, Python's.

    Raises:
        InputError: a value is not of its field's type, or not one of its choices.
    """
    for name, kind in get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        if get_origin(kind) is tuple:
            is_single = isinstance(value, str) or not isinstance(value, Iterable)
            item = get_args(kind)[0]
            value = tuple(_settled(name, each, item) for each in ([value] if is_single else value))
        else:
            value = _settled(name, value, kind)
        object.__setattr__(settings, name, value)


def _settled(name: str, value: Any, kind: Any) -> Any:
    """One value of a field, which may be of a type, one or None (`int | None`), or one of some choices."""
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        raise InputError(f"--{name} is {value!r}, expected one of {', '.join(get_args(kind))}")
    kinds = get_args(kind) or (kind,)
    if value is None and NoneType in kinds:
        return None
    kind = kinds[0]
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    fits = {
        Path: isinstance(value, str | os.PathLike),
        bool: isinstance(value, bool),
        int: is_number and value % 1 == 0,
        float: is_number,
        str: is_number or isinstance(value, str),
    }
    if not fits[kind]:
        raise InputError(f"--{name} is {value!r}, expected {_EXPECTED[kind]}")
    return kind(value)
