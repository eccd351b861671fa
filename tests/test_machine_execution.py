"""Kernels executed as machine code compute what their references do, and a fault in the code shows."""

import importlib
import json
import os
import subprocess
import sys
from importlib.metadata import version

import pytest

from kernels.configuration import TRITON_OPERATIONS
from tests.runs import ROOT

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not version("triton").startswith("3.7."), reason="other assemblers: other code")


def run(module, *arguments, **environment):
    command = [sys.executable, "-m", module, *arguments]
    environment = {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def executed(*arguments, **environment):
    process = run("tests.executed_kernels", *arguments, **environment)
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_every_kernel_without_products_computes_its_reference(target):
    """Those with products are in `test_machine_code.py`."""
    done = executed(target)
    assert done["findings"] == []
    assert set(done["comparisons"]) == set(TRITON_OPERATIONS) - {"attention_context"}
    for operation, comparisons in done["comparisons"].items():
        assert comparisons
        assert [name for name, error, bound in comparisons if error > bound] == []
        configurations = importlib.import_module(f"kernels.{operation}.kernel").configurations()
        kernels = {f"{operation}'s {configuration.kernel.fn.__name__}" for configuration in configurations}
        assert kernels <= done["blocks"].keys()


def test_code_that_computes_something_else_is_seen():
    done = executed("sm_90", "dropout", PLANT=r"FMUL=FADD")
    assert any(error > bound for _, error, bound in done["comparisons"]["dropout"])


def test_a_race_is_found():
    done = executed("sm_90", "dropout", PLANT=r"BAR.SYNC.DEFER_BLOCKING 0x0=NOP")
    assert any("dropout's backward_kernel: race: " in finding for finding in done["findings"])


def test_the_command_says_what_it_executed():
    process = run("kernels.machine_code", "--op", "dropout")
    assert process.returncode == 0, process.stderr
    assert "dropout, masks, bfloat16, p=0.1" in process.stdout
    assert "machine code of sm_90, thread blocks executed: 36 of dropout's forward_kernel" in process.stdout
    process = run("kernels.machine_code", "--op", "dropout", "--target", "sm_100")
    assert process.returncode == 2
