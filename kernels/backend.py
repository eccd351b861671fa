"""Which implementation of an operation runs.

Only the PyTorch references exist so far, so "torch" is the one backend; the Triton kernels will register here.
"""

import os

BACKENDS = ("torch",)


def choose_backend(backend: str | None) -> str:
    """Resolve an operation's `backend` argument.

    Args:
        backend: a name from `BACKENDS`, or None for the environment's `KERNELS_BACKEND` and, without that, "torch".

    Raises:
        ValueError: the name is not a backend of this version.
    """
    chosen = backend or os.environ.get("KERNELS_BACKEND") or "torch"
    if chosen not in BACKENDS:
        source = "backend" if backend else "KERNELS_BACKEND"
        raise ValueError(f"{source}={chosen!r}: this version has {', '.join(BACKENDS)}")
    return chosen
