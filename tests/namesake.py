"""A stand-in for Hugging Face's distribution `kernels`: as much of it as shows whether it works beside ours."""

import zipfile
from pathlib import Path
from textwrap import dedent

FILES = {
    "kernels/__init__.py": """
        from kernels.layer import Mode

        from . import late
        from .utils import get_kernel

        def __getattr__(name):  # whatever else a release of transformers imports
            if name.startswith("_") or name == "absent":
                raise AttributeError(name)
            return type(name, (), {"__init__": lambda self, *args, **settings: None})
    """,
    "kernels/layer/__init__.py": "from .mode import Mode\n",
    "kernels/layer/mode.py": "class Mode: INFERENCE, TRAINING, TORCH_COMPILE = 1, 2, 4\n",
    "kernels/late.py": "def imported():\n    from kernels import get_kernel\n    return get_kernel\n",
    "kernels/utils.py": "def get_kernel(): return 'a kernel of theirs'\n",
}


def write_wheel(folder: Path, version: str = "0.0") -> Path:
    """A wheel of the stand-in; unpacked it is as good as installed.

    Args:
        folder: where to write it.
        version: what its metadata say; transformers takes some versions only.
    """
    info = f"kernels-{version}.dist-info"
    metadata = {
        "METADATA": f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: gptbert\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files = {name: dedent(text) for name, text in FILES.items()} | {
        f"{info}/{name}": text for name, text in metadata.items()
    }
    path = folder / f"kernels-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
        wheel.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"]))
    return path
