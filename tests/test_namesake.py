"""Hugging Face's package `kernels` beside ours: both work, whichever is first on the path or imported first."""

import os
import subprocess
import sys
import zipfile

import pytest
from transformers.utils import import_utils

from kernels import namesake
from tests.namesake import write_wheel
from tests.runs import ROOT

OURS = """
import sys, kernels, kernels.lamb.reference
from kernels import check, masked_cross_entropy
assert kernels.__file__ == sys.argv[1] + "/kernels/__init__.py", kernels.__file__
assert "kernels.utils" not in sys.modules or ORDER == "theirs first", "it is loaded without need"
"""
THEIRS = """
from kernels import get_kernel, layer, Mode
import kernels.layer.mode
assert get_kernel() == "a kernel of theirs"
assert get_kernel is sys.modules["kernels.utils"].get_kernel is kernels.late.imported()
assert kernels.layer.mode.Mode is Mode is layer.Mode
assert kernels.Device and not hasattr(kernels, "absent") and not hasattr(kernels, "__wrapped__")
"""


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A folder with the stand-in, as pip installs it."""
    folder = tmp_path_factory.mktemp("theirs")
    version = getattr(import_utils, "KERNELS_MIN_VERSION", "0.10.2")
    with zipfile.ZipFile(write_wheel(tmp_path_factory.mktemp("wheels"), version)) as wheel:
        wheel.extractall(folder)
    return folder


def python(code, *paths):
    command = [sys.executable, "-P", "-c", code, str(ROOT)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_theirs_was_imported_first(theirs):
    """As by transformers, in a folder other than the checkout."""
    code = "import sys, kernels\nfrom kernels import get_kernel as before\nORDER = 'theirs first'\nimport gptbert\n"
    python(f"{code}{OURS}{THEIRS}assert get_kernel is before", theirs, ROOT)


def test_ours_is_imported_first_in_the_checkout(theirs):
    """Without gptbert, which `kernels` does not need."""
    python(f"ORDER = 'ours first'\n{OURS}{THEIRS}assert 'gptbert' not in sys.modules", ROOT, theirs)


def test_ours_is_imported_first_elsewhere_and_transformers_has_theirs(theirs):
    code = (
        "from transformers.integrations import hub_kernels\n"
        "assert any(value is get_kernel for value in vars(hub_kernels).values())\n"
    )
    python(f"import gptbert\nORDER = 'ours first'\n{OURS}{THEIRS}{code}", theirs, ROOT)


def test_without_theirs_there_is_nothing_more(tmp_path, monkeypatch):
    (tmp_path / "kernels").mkdir()  # a folder of that name is no package
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(ROOT), ""])
    monkeypatch.chdir(ROOT)
    assert namesake.folders() == []
    with pytest.raises(AttributeError, match="module 'kernels' has no attribute 'get_kernel'"):
        namesake.attribute("get_kernel")


def test_theirs_that_cannot_be_loaded_says_why_each_time(tmp_path, monkeypatch):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
            namesake.attribute("get_kernel")
