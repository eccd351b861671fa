"""Run a command on the stand-in for a GPU: `python -m tests.stand_in python -m pytest tests/gpu`."""

import hashlib
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def main() -> None:
    """Replace this process by the command."""
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    folder = built()
    paths = [str(HERE / "site"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    changes = {
        "LD_PRELOAD": str(folder / "libcuda.so.1"),
        "LD_LIBRARY_PATH": str(folder),
        "PYTHONPATH": os.pathsep.join(paths),
        "STAND_IN_LIBRARY": str(folder / "libcuda.so.1"),
    }
    program = [sys.executable if sys.argv[1] == "python" else sys.argv[1], *sys.argv[2:]]
    os.execvpe(program[0], program, os.environ | changes)  # noqa: S606 - the user's own command


def built() -> Path:
    """The folder of the library, which is built at the first call and after each change."""
    packages = Path(sysconfig.get_paths()["purelib"])
    headers = packages / "nvidia/cu13/include", packages / "triton/backends/nvidia/include"  # which has CUDA's crt/
    if not headers[0].is_dir():
        sys.exit(f"{headers[0]} is not there: the stand-in is for PyTorch's builds for CUDA 13, see make test-stand-in")
    sources = sorted(path for path in HERE.iterdir() if path.suffix in {".c", ".cpp", ".h"})
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"stand-in-{os.getuid()}-{digest}"
    library = folder / "libcuda.so.1"
    if not library.exists():
        folder.mkdir(exist_ok=True)
        new = folder / f"new-{os.getpid()}"
        objects = []
        for path in sources:
            if path.suffix != ".h":
                objects.append(f"{new}-{path.stem}.o")
                compiler = ["gcc"] if path.suffix == ".c" else ["g++", "-std=c++17"]
                flags = ["-O1", "-fPIC", *(f"-I{each}" for each in headers), "-c", path, "-o", objects[-1]]
                subprocess.run([*compiler, *flags], check=True)
        name = "-Wl,-soname,libcuda.so.1"
        subprocess.run(["g++", "-shared", name, *objects, "-o", new, "-ldl", "-lpthread"], check=True)
        new.rename(library)
    return folder


if __name__ == "__main__":
    main()
