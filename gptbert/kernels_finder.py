"""Has Python take our package `kernels` for that name, wherever it is.

A distribution of Hugging Face's has the name `kernels` too. It comes first on Python's path where gptbert is
installed, and cannot share a folder with ours: of two distributions with the same files, the one installed later
overwrites them, and removing one breaks the other. So a wheel has our package as `gptbert/_packages/kernels`, a
checkout as its folder `kernels`, and importing gptbert makes it `kernels`. The other package's modules and attributes
stay within reach (`kernels.namesake`).
"""

import importlib
import sys
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_OF_WHEEL = _HERE / "_packages" / "kernels"
_OURS = _OF_WHEEL if _OF_WHEEL.is_dir() else _HERE.parent / "kernels"


class KernelsFinder:
    """Finds our package `kernels` and no other module; for `sys.meta_path`."""

    @staticmethod
    def find_spec(name: str, *_: object) -> ModuleSpec | None:
        """The specification of our package, and None for other names, as importlib asks for it."""
        file = _OURS / "__init__.py"
        return spec_from_file_location(name, file) if name == "kernels" and file.is_file() else None


def install() -> None:
    """Make our package the one of that name in this process, in place of another one that was imported before."""
    if KernelsFinder in sys.meta_path:
        return
    sys.meta_path.insert(0, KernelsFinder)
    package = sys.modules.get("kernels")
    if package is not None and Path(getattr(package, "__file__", None) or "").resolve().parent != _OURS:
        del sys.modules["kernels"]  # its modules stay, as `kernels.…`
        importlib.import_module("kernels").namesake.use(package)
