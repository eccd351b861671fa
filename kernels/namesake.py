"""The other distribution named `kernels`: Hugging Face's, which transformers imports where it is installed.

Python knows one package of a name. Where that is ours, `from kernels import get_kernel` of transformers must work
too. So our package's path goes on with the folder of the other one, and attributes that ours does not have are the
other's. Ours come first. Of Hugging Face's releases from 0.4 to 0.17 none has a module with the name of one of ours,
except `check` in 0.10 to 0.12, which only that package's own command uses.

Where Python would take the other package for `kernels`, `gptbert.kernels_finder` sees to it that it takes ours.
"""

import sys
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType

_OURS = Path(__file__).resolve().parent
_loaded: ModuleType | None = None  # the other package, once it was needed


def folders() -> list[str]:
    """Where the other package's modules are: one folder, or none without such a package."""
    spec = _spec()
    return [] if spec is None else list(spec.submodule_search_locations)


def use(package: ModuleType) -> None:
    """Take this as the other package: it was imported before ours."""
    global _loaded  # noqa: PLW0603 - like every module, it is loaded once in a process
    _loaded = package


def attribute(name: str) -> object:
    """An attribute of the other package, which is loaded for it.

    Raises:
        AttributeError: there is no other package, or it has no such attribute, or one of our own modules has this name.
    """
    is_pythons = name.startswith("__") and name != "__version__"  # such as __wrapped__: inspect looks everywhere
    # `from kernels import lamb` looks for an attribute before it imports our module.
    if is_pythons or PathFinder.find_spec(f"kernels.{name}", [str(_OURS)]) or (package := _package()) is None:
        raise AttributeError(f"module 'kernels' has no attribute {name!r}")
    return getattr(package, name)


def _spec() -> ModuleSpec | None:
    """What Python would import as `kernels` if ours did not exist."""
    paths = [path for path in sys.path if Path(path, "kernels").resolve() != _OURS]
    spec = PathFinder.find_spec("kernels", paths)
    is_package = spec is not None and spec.origin is not None and spec.submodule_search_locations  # not a mere folder
    return spec if is_package else None


def _package() -> ModuleType | None:
    """The other package, not in `sys.modules`: its modules are, as `kernels.…`, and `kernels` is ours."""
    if _loaded is None and (spec := _spec()) is not None:
        use(module_from_spec(spec))  # before it is executed: it may import from itself, which leads here
        try:
            spec.loader.exec_module(_loaded)
        except BaseException:
            use(None)
            raise
    return _loaded
