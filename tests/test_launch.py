"""Triton's own launch path, up to the driver: launchers work outside the interpreter, and launch inspected kernels."""

import importlib
import json
import os
import subprocess
import sys

import pytest

from kernels.configuration import TRITON_OPERATIONS
from tests.runs import ROOT


@pytest.fixture(params=TRITON_OPERATIONS)
def operation(request):
    return request.param


@pytest.fixture(scope="module")
def all_launches():
    """Those of all checks."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.dry_launch"]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout)


@pytest.fixture
def launches(operation, all_launches):
    """Those of the operation's kernels by its own check; attention's check has gated norms too."""
    return [launch for launch in all_launches if launch["check"] == launch["operation"] == operation]


def matches(launch, configuration):
    """Whether the inspected configuration is what the launch compiles, or a less aligned (no faster) variant."""
    ones = launch["constants"].keys() & configuration.types.keys()  # a size of 1 becomes a constant, which costs less
    constants = {name: value for name, value in launch["constants"].items() if name not in ones}
    return (
        launch["kernel"] == configuration.kernel.fn.__name__
        and launch["types"] == {name: kind for name, kind in configuration.types.items() if name not in ones}
        and constants == {name: as_json(value) for name, value in configuration.constants.items()}
        and launch["num_warps"] == configuration.num_warps
        and launch["max_registers"] == configuration.max_registers
        and configuration.aligned <= set(launch["aligned"])
    )


def as_json(value):
    return value if isinstance(value, int | None) else str(value)


def test_every_launch_is_a_configuration_that_is_inspected(operation, launches):
    configurations = importlib.import_module(f"kernels.{operation}.kernel").configurations()
    unknown = [launch for launch in launches if not any(matches(launch, known) for known in configurations)]
    assert not unknown, f"{len(unknown)} of {len(launches)} launches: {unknown}"
    kernels = {configuration.kernel.fn.__name__ for configuration in configurations}
    assert kernels == {launch["kernel"] for launch in launches}, "the check launches every kernel"


def test_configurations_are_named_once(operation):
    names = [known.name for known in importlib.import_module(f"kernels.{operation}.kernel").configurations()]
    assert len(set(names)) == len(names)
    assert all(name.startswith(f"{operation}/") for name in names)
