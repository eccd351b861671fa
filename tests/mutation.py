"""Planted bugs: a kernel with one line changed replaces the correct one."""

import importlib
import importlib.util
import re
from contextlib import contextmanager
from pathlib import Path


def replaced(source, old, new):
    """`source` with `old` replaced by `new`; `old` must occur exactly once, at any indentation.

    Whitespace in `old` matches any whitespace, and a line break in it a line break with any indentation. Line breaks in
    `new` take the indentation of those that they replace, in order.
    """
    pattern = ""
    for part in re.split(r"(\s+)", old):
        white = r"\s*\n\s*" if "\n" in part else r"\s+"
        pattern += white if part.isspace() else re.escape(part)
    found = list(re.finditer(pattern, source))
    assert len(found) == 1, f"{len(found)} times: {old}"
    breaks = iter(re.findall(r"\n\s*", found[0].group()))
    new = re.sub(r"\n\s*", lambda own: next(breaks, own.group()), new)
    return source[: found[0].start()] + new + source[found[0].end() :]


@contextmanager
def mutated(module_name, old, new, folder, users=()):
    """Context manager: the module behaves as if its source had `new` in place of `old`; see `replaced`.

    Callers must look names up in the module at each call (`kernel.launch(…)`), not bind them earlier; modules that
    import names from it are given as `users`.
    """
    module = importlib.import_module(module_name)
    source = replaced(Path(module.__file__).read_text(encoding="utf-8"), old, new)
    path = folder / "mutant.py"
    path.write_text(source, encoding="utf-8")  # a file, because Triton reads its kernels' source
    spec = importlib.util.spec_from_file_location("mutant", path)
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    right = {name: value for name, value in vars(module).items() if not name.startswith("__")}
    wrong = {name: value for name, value in vars(mutant).items() if not name.startswith("__")}
    # the interpreter adds names of its own to a module
    names = right.keys() & wrong.keys()
    imported = [{name for name in names if vars(user).get(name, right) is right[name]} for user in users]
    vars(module).update(wrong)
    for user, own in zip(users, imported, strict=True):
        vars(user).update({name: wrong[name] for name in own})
    try:
        yield
    finally:
        vars(module).update(right)
        for user, own in zip(users, imported, strict=True):
            vars(user).update({name: right[name] for name in own})
