"""Planted bugs: a kernel with one line changed, put in the place of the right one."""

import importlib
import importlib.util
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def mutated(module_name, old, new, folder):
    """Inside the context, everything in the module is as if its source said `new` where it says `old`.

    Callers must look names up in the module at each call (`kernel.launch(…)`), not hold them.
    """
    module = importlib.import_module(module_name)
    source = Path(module.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1, f"{module_name} says {source.count(old)} times: {old}"
    path = folder / "mutant.py"
    path.write_text(source.replace(old, new), encoding="utf-8")  # a file, because Triton reads its kernels' source
    spec = importlib.util.spec_from_file_location("mutant", path)
    mutant = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mutant)
    right = {name: value for name, value in vars(module).items() if not name.startswith("__")}
    vars(module).update({name: value for name, value in vars(mutant).items() if not name.startswith("__")})
    try:
        yield
    finally:
        vars(module).update(right)
