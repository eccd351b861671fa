"""A wheel, built and unpacked away from the repository: it holds what is needed, and trains."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from tests.runs import ROOT, flags, write_inputs

SOURCES = ("gptbert", "kernels", "tokenize_scripts", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the wheel's files."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / "source")
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder)
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, folder / "source"], check=True)
    (wheel,) = folder.glob("gptbert-*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "installed")
    return folder / "installed"


def test_a_wheel_has_every_file_of_the_packages(installed):
    for package in ("gptbert", "kernels", "tokenize_scripts"):
        files = {path.relative_to(ROOT) for path in (ROOT / package).rglob("*") if path.is_file()}
        needed = {path for path in files if path.suffix not in {".pyc", ".md"}}
        assert needed
        assert not {str(path) for path in needed if not (installed / path).is_file()}


def test_a_wheel_trains(installed, tmp_path):
    inputs = write_inputs(tmp_path, train_characters=20_000)
    shape = {"config_file": "tiny", "vocab_size": False}
    options = flags(inputs, max_steps=2, validate_every=0, no_compile=True, kernels="torch", **shape)
    code = "import gptbert, sys; print(gptbert.__file__, file=sys.stderr); from gptbert.__main__ import main; main()"
    environment = os.environ | {"PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", code, "train", *options]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(str(installed))
    assert (inputs / "runs").is_dir()
