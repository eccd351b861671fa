"""The fields of a dataclass of settings, as the command line gives them, where Python code gives them."""

from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from gptbert.errors import InputError


def settle(settings: Any) -> None:
    """Replace values of a frozen dataclass: texts by paths and lists by tuples, where these are the fields' types.

    Raises:
        InputError: a value is not one of its field's choices.
    """
    for name, kind in get_type_hints(type(settings)).items():
        value, item = getattr(settings, name), kind
        if get_origin(kind) is tuple:
            item = get_args(kind)[0]
            value = tuple([value] if isinstance(value, str | Path) else value)
        if Path in (item, *get_args(item)):
            value = tuple(map(Path, value)) if isinstance(value, tuple) else value and Path(value)
        choices = get_args(item) if get_origin(item) is Literal else ()
        wrong = [one for one in (value if isinstance(value, tuple) else [value]) if choices and one not in choices]
        if wrong:
            raise InputError(f"--{name} is {wrong[0]!r}, expected one of {', '.join(choices)}")
        object.__setattr__(settings, name, value)
