"""The stand-in for a GPU, below a PyTorch for CUDA: what it must show of streams, pinned memory and recordings."""

import os
import subprocess
import sys

import pytest
import torch

from tests.lanes import NO_GPU
from tests.runs import ROOT, flags, write_inputs

pytestmark = pytest.mark.skipif(
    not torch.version.cuda or not sys.platform.startswith("linux") or torch.cuda.is_available(),
    reason="the stand-in is for PyTorch's builds for CUDA, where there is no GPU",
)


def on_stand_in(*arguments, **variables):
    """Run Python there; returns what it prints."""
    environment = {name: value for name, value in os.environ.items() if name not in NO_GPU} | variables
    command = [sys.executable, "-m", "tests.stand_in", "python", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, done.stderr


def test_a_copy_from_pinned_memory_may_be_late():
    """Until somebody waits, the host's next number is what arrives."""
    code = """
import torch
pinned = torch.ones(4).pin_memory()
early, late = (pinned.to("cuda", non_blocking=True) for _ in range(2))
torch.cuda.synchronize()
late = pinned.to("cuda", non_blocking=True)
pinned.fill_(2)
print(early.tolist(), late.tolist())
"""
    assert on_stand_in("-c", code)[0] == f"{[1.0] * 4} {[2.0] * 4}\n"


def test_streams_are_not_in_step():
    code = """
import torch
other, x = torch.cuda.Stream(), torch.zeros(3, device="cuda")
torch.cuda.synchronize()
with torch.cuda.stream(other):
    x += 1
seen = x.clone()
torch.cuda.current_stream().wait_stream(other)
print(seen.tolist(), x.tolist())
"""
    assert on_stand_in("-c", code)[0] == f"{[0.0] * 3} {[1.0] * 3}\n"


def test_a_graph_computes_again():
    code = """
import torch
x, weight = torch.zeros(8, 16, device="cuda"), torch.randn(16, 4).cuda()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    y = torch.nn.functional.gelu(x @ weight)
x.copy_(torch.randn(8, 16))
graph.replay()
expected = torch.nn.functional.gelu(x.cpu() @ weight.cpu())
print(torch.equal(y.cpu(), expected), bool(expected.any()))
"""
    assert on_stand_in("-c", code)[0] == "True True\n"


@pytest.mark.parametrize("line", ["x.item()", "x.copy_(torch.ones(3))", "torch.cuda.synchronize()", "x[x > 0]"])
def test_a_recording_refuses_to_wait(line):
    code = f"""
import torch
x, graph = torch.zeros(1, device="cuda").expand(3), torch.cuda.CUDAGraph()
x = x[:1] if "item" in {line!r} else x.clone()
try:
    with torch.cuda.graph(graph):
        {line}
except RuntimeError:
    print("refused")
"""
    assert on_stand_in("-c", code)[0] == "refused\n"


def test_memory_begins_with_nans():
    assert on_stand_in("-c", "import torch; print(bool(torch.empty(5, device='cuda').isnan().all()))")[0] == "True\n"


def test_kernels_are_executed_as_machine_code():
    code = """
import torch
from kernels import wanted
from kernels.normalize.fused import activate
wanted.use_fused(wanted.FUSED)
x = torch.randn(5, 64)
y = activate(x.cuda(), None, 0.0, 1e-5).cpu()
expected = torch.nn.functional.layer_norm(torch.nn.functional.gelu(x), (64,), eps=1e-5)
print(bool((y - expected).abs().max() < 1e-5), bool(y.any()))
"""
    assert on_stand_in("-c", code)[0] == "True True\n"


def test_a_recorded_run_has_the_bits_of_a_launched_one(tmp_path):
    """With PyTorch's operations, since Triton's take ten seconds a step here; `make test-stand-in` has both."""
    inputs, weights = write_inputs(tmp_path), []
    for mode in ("on", "off"):
        settings = {"cuda_graph": mode, "kernels": "torch", "device": "cuda", "no_compile": True, "max_steps": 6}
        on_stand_in("train_distributed.py", *flags(inputs, name=mode, **settings))
        (path,) = (inputs / "runs" / mode).glob("checkpoints/*/model.safetensors")
        weights.append(path.read_bytes())
    assert weights[0] == weights[1]
