"""The assembler of kernels with matrix products: a wrong one costs speed, not the run."""

import os

import pytest
import torch

from gptbert.distributed.world import World
from gptbert.monitoring import display
from gptbert.training import preparation
from kernels import assembler, wanted
from kernels.assembler import is_right, use_right_assembler

GPU = World(0, 1, torch.device("cuda", 0))


@pytest.fixture(autouse=True)
def nothing_stays(monkeypatch):
    monkeypatch.setenv("TRITON_PTXAS_PATH", "")  # restored afterwards
    del os.environ["TRITON_PTXAS_PATH"]
    use_right_assembler.cache_clear()
    yield
    use_right_assembler.cache_clear()


@pytest.mark.parametrize(
    ("release", "right"), [("12.8", False), ("12.8.93", False), ("12.9", True), ("13.1.80", True), (None, True)]
)
def test_one_release_is_known_to_be_wrong(release, right):
    assert is_right(release) is right


@pytest.mark.parametrize(
    ("first", "later", "used"),
    [("12.8", "12.9", "12.9"), ("12.8", None, "12.8"), ("12.8", "12.8", "12.8"), ("13.0", "13.1", "13.0"),
     (None, None, None)],
)  # fmt: skip
def test_a_later_one_is_used_where_the_first_is_wrong(monkeypatch, first, later, used):
    releases = {"ptxas": first, "ptxas_blackwell": later}
    monkeypatch.setattr(assembler, "_release_of", releases.get)
    for _ in range(2):
        assert use_right_assembler() == used
        assert ("TRITON_PTXAS_PATH" in os.environ) == (used != first), "from the first call on"


def test_one_that_is_named_is_left_alone(monkeypatch):
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/their/ptxas")
    monkeypatch.setattr(assembler, "_release_of", {"ptxas": "12.8"}.get)
    assert (use_right_assembler(), os.environ["TRITON_PTXAS_PATH"]) == ("12.8", "/their/ptxas")


@pytest.mark.parametrize(("release", "is_fused"), [("12.8", False), ("12.9", True)])
def test_without_a_right_one_a_run_does_without_fused_operations(make_config, monkeypatch, capfd, release, is_fused):
    monkeypatch.setattr(preparation, "use_right_assembler", lambda: release)
    monkeypatch.setattr(preparation, "choose_backend", lambda *_: "triton")
    assert preparation.prepare_kernels(make_config(), GPU) == "triton"
    assert all(map(wanted.is_wanted, wanted.FUSED)) is is_fused
    said = capfd.readouterr().err
    assert said.startswith("ptxas 12.8 is known to make wrong code") is not is_fused
    monkeypatch.setattr(display, "use_right_assembler", lambda: release)
    line = display._ways(make_config(cuda_graph="off"), GPU)
    fused = "attention_context (gather), gated_norm, normalize, dropout, depth_mix" if is_fused else "nothing"
    assert line == f"fused: {fused}; assembled by ptxas {release}; steps not recorded"
    on_cpu = display._ways(make_config(cuda_graph="on"), World(0, 1, torch.device("cpu")))
    assert on_cpu == f"fused: {fused}; steps recorded in CUDA graphs"
