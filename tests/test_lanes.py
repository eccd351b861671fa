"""Test lanes: only the GPU lane's tests see a GPU, and they are skipped if there is none."""

import os
import subprocess
import sys

import pytest
import torch

from kernels.backend import choose_backend
from tests.lanes import NO_GPU
from tests.runs import ROOT


def python(*arguments, **environment):
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)


def test_no_gpu_is_seen_here_and_in_processes_that_tests_start():
    assert {name: os.environ.get(name) for name in NO_GPU} == NO_GPU
    assert not torch.cuda.is_available()
    assert torch.cuda.device_count() == 0
    assert choose_backend(None, torch.device("cpu")) == "torch"
    seen = python("-c", "import torch; print(torch.cuda.device_count(), torch.cuda._parse_visible_devices())")
    assert seen.stdout.split() == ["0", "[]"], seen.stderr


def test_gpus_are_hidden_before_anything_looks_for_them():
    """Likewise, Triton is set to interpret before it is first imported."""
    code = (
        "import os, sys, torch\n"
        "def hidden(*_):\n"
        "    if os.environ['CUDA_VISIBLE_DEVICES'] != '-1': sys.exit('looked for a GPU')\n"
        "    return 0\n"
        "torch.cuda.device_count = torch.cuda.is_available = torch._C._cuda_init = hidden\n"
        "class Watch:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'triton' and os.environ['TRITON_INTERPRET'] != '1': sys.exit('looked for Triton')\n"
        "sys.meta_path.insert(0, Watch())\n"
        "import tests.conftest\n"
        "print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['TRITON_INTERPRET'])\n"
    )
    ran = python("-c", code, CUDA_VISIBLE_DEVICES="0", TRITON_INTERPRET="0")
    assert (ran.returncode, ran.stdout.split()) == (0, ["-1", "1"]), ran.stderr


def test_the_gpus_lane_is_its_folder_alone_and_skips_without_one():
    ran = python("-m", "pytest", "tests", "-p", "no:cacheprovider", "-o", "addopts=-q -rs", GPTBERT_TEST_DEVICE="cuda")
    assert ran.returncode == 0, ran.stdout
    assert "there is no GPU here" in ran.stdout
    summary = ran.stdout.splitlines()[-1]
    assert "skipped" in summary
    assert "passed" not in summary
    assert "failed" not in summary


def test_a_device_that_is_none_is_refused():
    ran = python("-m", "pytest", "tests/test_lanes.py", "--collect-only", GPTBERT_TEST_DEVICE="tpu")
    assert ran.returncode != 0
    assert "GPTBERT_TEST_DEVICE='tpu': expected cpu or cuda" in ran.stderr


@pytest.mark.parametrize("file", sorted((ROOT / "tests" / "gpu").glob("test_*.py")), ids=lambda file: file.name)
def test_the_lanes_files_can_be_told_apart(file):
    """Pytest imports test files by base name only, so names must differ."""
    assert not (ROOT / "tests" / file.name).exists()
