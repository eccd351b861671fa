"""A wheel, built, and installed without the repository: it holds what is needed, and trains."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest

import gptbert
from tests.namesake import write_wheel
from tests.runs import ROOT, flags, write_inputs

SOURCES = ("gptbert", "kernels", "tokenize_scripts", "setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / "source")
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder)
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, folder / "source"], check=True)
    (path,) = folder.glob("gptbert-*.whl")
    return path


@pytest.fixture
def environment(tmp_path):
    """The Python of an empty environment.

    What a wheel needs it finds in the running environment, whose .pth files, as of an editable install, have no effect.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    (packages,) = (tmp_path / "venv").glob("lib/*/site-packages")
    (packages / "needed.pth").write_text(sysconfig.get_path("purelib"))
    return python


def install(python, *wheels):
    options = ("--quiet", "--no-deps", "--no-index", "--no-compile", "--force-reinstall")
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", *options, *wheels], check=True)


def run(python, *command):
    """What the command prints, in a folder away from the repository."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, *command], cwd=python.parent, env=variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_wheel_has_every_file_of_the_packages_and_no_other_folder(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"gptbert", "tokenize_scripts"}
    for package in ("gptbert", "kernels", "tokenize_scripts"):
        files = {path.relative_to(ROOT) for path in (ROOT / package).rglob("*") if path.is_file()}
        needed = {path.as_posix() for path in files if path.suffix not in {".pyc", ".md"}}
        assert needed
        within = "gptbert/_packages/" if package == "kernels" else ""
        assert not {name for name in needed if within + name not in names}
    assert {f"gptbert-{gptbert.__version__}.dist-info/licenses/{name}" for name in ("LICENSE", "NOTICE")} <= set(names)


def test_a_wheel_trains_and_another_distribution_named_kernels_works_too(wheel, environment, tmp_path):
    inputs = write_inputs(tmp_path, train_characters=20_000)
    shape = {"config_file": "tiny", "vocab_size": False}
    options = flags(inputs, max_steps=2, validate_every=0, no_compile=True, kernels="torch", **shape)
    theirs = write_wheel(tmp_path)
    install(environment, theirs)
    install(environment, wheel)
    run(environment, "-m", "torch.distributed.run", "--standalone", "-m", "gptbert.train", *options)
    assert (inputs / "runs").is_dir()
    install(environment, theirs)  # after the wheel
    code = "import kernels as theirs, gptbert, kernels; print(theirs.__file__, kernels.__file__, kernels.get_kernel())"
    (packages,) = (tmp_path / "venv").glob("lib/*/site-packages")
    files = f"{packages}/kernels/__init__.py {packages}/gptbert/_packages/kernels/__init__.py"
    assert run(environment, "-c", code) == f"{files} a kernel of theirs\n"
