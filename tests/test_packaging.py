"""What several files say about the package is the same: versions, of Python and PyTorch too, and what it is made of."""

import re
import sys
import tomllib

import pytest
import yaml

import gptbert
from gptbert.__main__ import main
from tests.runs import ROOT
from tests.test_architecture import imports
from tests.test_wheel import SOURCES

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load(read("CITATION.cff"))
    assert (citation["title"], citation["version"]) == (PROJECT["name"], gptbert.__version__)
    assert (citation["license"], citation["keywords"]) == (PROJECT["license"], PROJECT["keywords"])
    assert citation["authors"] == PROJECT["authors"]
    assert citation["abstract"] == PROJECT["description"]


def test_the_command_says_its_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"gptbert {gptbert.__version__}\n"


def test_the_workflow_has_each_python_and_the_oldest_pytorch():
    jobs = yaml.safe_load(read(".github/workflows/test.yml"))["jobs"]
    pythons = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r":: Python :: 3\.\d+$", line)]
    assert PROJECT["requires-python"] == f">={pythons[0]}"
    for job in ("test", "torch"):
        assert jobs[job]["strategy"]["matrix"]["python"] == pythons
    (needed,) = (name for name in PROJECT["dependencies"] if name.startswith("torch>="))
    oldest = needed.removeprefix("torch>=") + ".0"
    assert jobs["torch"]["strategy"]["matrix"]["torch"] == [oldest, "newest"]
    assert f"\nTORCH ?= {oldest}\n" in read("Makefile")


@pytest.mark.parametrize("job", ["files", "test", "torch"])
def test_the_workflow_calls_targets_that_exist(job):
    steps = yaml.safe_load(read(".github/workflows/test.yml"))["jobs"][job]["steps"]
    (command,) = (step["run"] for step in steps if "run" in step)
    targets = [word for word in command.split("$")[0].split() if word != "make" and "=" not in word]
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", read("Makefile"), re.MULTILINE), target


def test_an_image_is_made_of_what_a_wheel_is_made_of():
    allowed = set(re.findall(r"^!/(\S+)$", read(".dockerignore"), re.MULTILINE))
    assert allowed == {*SOURCES, "constraints.txt"}


def test_what_the_package_imports_is_declared():
    """On demand only: Triton, which PyTorch brings; matplotlib, without which a chart is left out; and transformers,
    which imports the exported files."""
    extras = PROJECT["optional-dependencies"]
    declared = {re.match(r"\w+", name)[0] for name in [*PROJECT["dependencies"], *extras["datasets"]]}
    known = declared - {"pyyaml"} | {"yaml", "triton", "matplotlib", "transformers", "gptbert", "kernels"}
    files = [file for part in ("gptbert", "kernels", "tokenize_scripts") for file in (ROOT / part).rglob("*.py")]
    tops = {name.partition(".")[0] for file in files for name in imports(file)} - sys.stdlib_module_names
    assert {"torch", "scipy", "pyarrow"} <= tops
    assert not tops - known - {"tokenize_scripts"}
