"""Bytes moved in the interpreter: the counter against hand-counted kernels, and limits on small jobs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
import triton
import triton.language as tl

from benchmarks import traffic
from benchmarks.counted import Counted, CountedJob
from kernels.backend import interpreted
from kernels.configuration import TRITON_OPERATIONS

pytestmark = pytest.mark.skipif(not interpreted(), reason="counts in Triton's interpreter; here kernels run on the GPU")


@triton.jit
def copy_kernel(source, target, length, block: tl.constexpr):
    """Reads and writes each element inside the mask once."""
    lanes = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(target + lanes, tl.load(source + lanes, mask=lanes < length), mask=lanes < length)


@triton.jit
def twice_kernel(source, target, length, block: tl.constexpr):
    lanes = tl.program_id(0) * block + tl.arange(0, block)
    total = tl.load(source + lanes, mask=lanes < length) + tl.load(source + lanes, mask=lanes < length)
    tl.store(target + lanes, total, mask=lanes < length)


@triton.jit
def sundry_kernel(source, target, counter, block: tl.constexpr):
    """A scalar; an unmasked block; a block through a descriptor with its end out of bounds; and two atomics."""
    scalar = tl.load(counter)
    values = tl.load(source + tl.arange(0, block))
    tl.make_tensor_descriptor(target, (block - 3,), (1,), (block,)).store((0,), values.to(tl.int16))
    tl.atomic_add(counter + tl.arange(0, block), scalar, mask=tl.arange(0, block) < 5)
    tl.atomic_cas(counter, scalar, scalar)


def run(kernel, dtype, length=1000, block=256):
    source, target = torch.ones(length, dtype=dtype), torch.zeros(length, dtype=dtype)
    with Counted() as counted:
        kernel[(triton.cdiv(length, block),)](source, target, length, block=block)
    return counted, target


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.int64])
def test_only_lanes_inside_the_mask_count(dtype):
    for kernel, loads in ((copy_kernel, 1), (twice_kernel, 2)):
        (moved,) = run(kernel, torch.float32)[0].kernels.values()
        assert (moved.launches, moved.loaded, moved.stored) == (1, loads * 4000, 4000)
    (moved,) = run(copy_kernel, dtype)[0].kernels.values()
    assert (moved.loaded, moved.stored) == (1000 * dtype.itemsize,) * 2


def test_a_kernel_that_reads_twice_moves_half_as_much_again():
    counted, target = run(twice_kernel, torch.float32)
    assert (target == 2).all()  # counting does not change the result
    job = traffic._job("twice", counted, 2 * 4000, 1.05)
    assert job.ratio == 1.5
    assert job.broken_bars() == ["twice: 1.5000 of the fewest bytes, at most 1.05 allowed"]
    assert traffic._job("once", run(copy_kernel, torch.float32)[0], 2 * 4000, 1.05).broken_bars() == []


def test_scalars_descriptors_and_atomics():
    source, target, counter = torch.ones(16), torch.zeros(16, dtype=torch.int16), torch.zeros(16, dtype=torch.int64)
    with Counted() as counted:
        sundry_kernel[(2,)](source, target, counter, block=16)
    atomics = 8 * (5 + 1)
    assert counted.kernels["sundry_kernel"].loaded == 2 * (8 + 16 * 4 + atomics)
    assert counted.kernels["sundry_kernel"].stored == 2 * (13 * 2 + atomics)


def test_kernels_and_launches_are_told_apart_and_nothing_counts_afterwards():
    source, target = torch.ones(8), torch.zeros(8)
    with Counted() as counted:
        for kernel in (copy_kernel, twice_kernel, copy_kernel):
            kernel[(1,)](source, target, 8, block=8)
    assert {name: moved.launches for name, moved in counted.kernels.items()} == {"copy_kernel": 2, "twice_kernel": 1}
    assert counted.launches == 3
    assert counted.total == 32 * (2 + 3 + 2)
    copy_kernel[(1,)](source, target, 8, block=8)
    assert counted.launches == 3


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"moved": 106}, "1.0600 of the fewest bytes, at most 1.05 allowed"),
        ({"moved": 99}, "99 bytes, fewer than are possible: something did not run"),
        ({"launches": 5, "launch_bar": 4}, "5 launches, at most 4 allowed"),
        ({"liger": 150, "liger_bar": 0.65}, "0.667 of Liger-Kernel's, at most 0.65 allowed"),
    ],
)
def test_a_broken_bar_is_a_line_and_the_exit_status(changes, line, monkeypatch, capsys):
    good = {"name": "job", "moved": 100, "fewest": 100, "bar": 1.05, "launches": 4, "launch_bar": 4, "liger": 200}
    for values, status in ((good | {"liger_bar": 0.65}, 0), (good | changes, 1)):
        monkeypatch.setattr(traffic, "count", lambda _, values=values: [CountedJob(**values)])
        with pytest.raises(SystemExit) as error:
            traffic.run(traffic.TrafficConfig(json=True))
        captured = capsys.readouterr()
        assert error.value.code == status
        assert json.loads(captured.out)["broken_bars"] == captured.err.splitlines() == ([f"job: {line}"] * status)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocab_size", [8192, 50257])
def test_cross_entropy_reads_each_logit_once(vocab_size, dtype):
    jobs = list(traffic.cross_entropy_jobs(vocab_size, dtype))
    assert len(jobs) == 4
    for job in jobs:
        assert job.broken_bars() == []
        assert job.liger is None or job.liger_ratio < 0.73
    assert jobs[0].fewest == 2 * 5 * vocab_size * dtype.itemsize + 5 * 8 + 12
    assert jobs[2].fewest == (3 + 5) * vocab_size * dtype.itemsize + 5 * 8 + 12


@pytest.mark.parametrize(
    ("shape", "job"),
    [
        ([5, 8192], lambda: next(traffic.cross_entropy_jobs(8192, torch.float32))),
        ([700, 300], lambda: traffic.lamb_job("a tensor", [torch.Size((700, 300))])),
    ],
)
def test_pytorch_moves_nothing_beside_the_kernels(shape, job, monkeypatch):
    """PyTorch's operations are not counted, so none may touch tensors of that size."""
    monkeypatch.setattr(traffic, "has_liger", lambda: False)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        job()
    events = profile.events()
    ours = next(index for index, event in enumerate(events) if event.name.startswith("kernels::"))
    operations = {event.name for event in events[ours:] if shape in (event.input_shapes or [])}
    assert {name for name in operations if name.startswith("aten::")} <= {
        "aten::detach", "aten::empty_like", "aten::new_empty", "aten::new_empty_strided", "aten::to", "aten::view",
    }  # fmt: skip


@pytest.mark.skipif(not traffic.has_liger(), reason="needs Liger-Kernel, extra [bench]")
@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_liger_computes_the_same_and_moves_what_its_source_says(weight):
    """Two reads and one write per logit, and one more read and write if the gradient is scaled afterwards."""
    labels = traffic._labels(5, 2, 8192)
    theirs, ours = traffic._logits(5, 8192, torch.float32), traffic._logits(5, 8192, torch.float32)
    with Counted() as counted:
        loss = traffic.liger_cross_entropy(theirs, labels, weight)
    log_probs = ours.log_softmax(-1)
    z_loss = ours.logsumexp(-1).square()[2:].mean()
    expected = weight * (traffic.Z_LOSS_WEIGHT * z_loss - log_probs[torch.arange(2, 5), labels[2:]].mean())
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(theirs.grad, ours.grad)
    passes = 2 * 3 + 5 + (0 if weight == 1 else 2 * 5)
    assert counted.total == pytest.approx(passes * 8192 * 4, rel=2e-3)


def test_masked_cross_entropy_moves_labeled_rows_only():
    job = traffic.masked_cross_entropy_job()
    assert job.broken_bars() == []
    assert job.fewest == 12 * (2 * 8192 * 4 + 16) + 20 + 2 * 4 * 32 * (20 + 8192)
    assert {name: moved.launches for name, moved in job.kernels.items()} == {
        "rows_kernel": 1, "sum_kernel": 1, "multiply_kernel": 1,
    }  # fmt: skip


def test_lamb_moves_52_bytes_a_parameter_in_four_launches():
    shapes = [torch.Size(shape) for shape in ((700, 300), (1,), (385,), (300_000,))]
    job = traffic.lamb_job("a few tensors", shapes)
    assert job.broken_bars() == []
    assert job.fewest == 52 * (210_000 + 1 + 385 + 300_000)


def test_a_copy_is_two_bytes_a_parameter_more():
    shapes = [torch.Size(shape) for shape in ((700, 300), (1,), (385,), (300_000,))]
    without, copied = (
        traffic.lamb_job("a few tensors", shapes, copied) for copied in (None, [True, False, True, False])
    )
    assert copied.broken_bars() == []
    assert copied.fewest - without.fewest == 2 * (210_000 + 385)
    assert 2 * (210_000 + 385) <= copied.moved - without.moved < 2 * (210_000 + 385) + 2000, "and the addresses"
    assert copied.launches == without.launches


def test_lamb_updates_the_tensors_of_the_small_model():
    shapes, are_copied = traffic.model_shapes("small.json")
    of_layer = 7  # two weights and biases of attention, its output, both of feed-forward
    assert sum(are_copied) == 12 * of_layer + 1, "and the embedding"
    assert torch.Size((8192, 384)) in shapes
    assert 29e6 < sum(shape.numel() for shape in shapes) < 31e6


def test_mixes_move_what_groups_of_six_must():
    job = traffic.depth_mix_job(rows=32, size=128)
    assert job.fewest == 1626 * 32 * 128
    assert job.broken_bars() == []
    assert 1 <= job.ratio < job.bar


def test_gated_norms_embedding_and_head_move_what_they_must():
    jobs = [*traffic.gated_norm_jobs(rows=16), *traffic.normalize_jobs(rows=16)]
    fewest = [18 * 16 * 2560, 18 * 16 * 768, 20 * 16 * 768, 10 * 16 * 768, 12 * 16 * 768]
    assert [job.fewest for job in jobs] == fewest
    for job in jobs:
        assert job.broken_bars() == []
        assert 1 <= job.ratio < job.bar


@pytest.mark.parametrize("length", traffic.LENGTHS)
def test_span_mask_reads_and_writes_each_token_once(length):
    plain, counted = traffic.span_mask_jobs(length)
    assert plain.broken_bars() == counted.broken_bars() == []
    rows = {128: 4, 129: 3, 513: 1, 4096: 1}[length]
    assert (plain.fewest, counted.fewest) == (rows * (24 * length + 8), rows * (25 * length + 8))


@pytest.mark.parametrize("operation", get_args(traffic.Operation))
def test_each_operation_has_its_jobs(operation, monkeypatch):
    for name in [name for name in vars(traffic) if name.endswith(("_job", "_jobs"))]:
        one = CountedJob(name, 1, 1, 1.0, 1)
        result = [one] if name.endswith("s") else one
        monkeypatch.setattr(traffic, name, lambda *_, result=result: result)
    found = {job.name for job in traffic.count(traffic.TrafficConfig(op=(operation,)))}
    assert {name.rpartition("_")[0] for name in found} == {operation}


def test_every_operation_with_triton_kernels_is_counted():
    """But attention, whose time goes into products, and dropouts, of the few position vectors alone."""
    counted = {"masked_cross_entropy" if name == "cross_entropy" else name for name in get_args(traffic.Operation)}
    assert counted | {"attention_context", "dropout"} == set(TRITON_OPERATIONS)


def test_the_command_interprets_kernels_by_itself(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    command = [sys.executable, "-m", "benchmarks.traffic", "--op", "masked_cross_entropy", "--json"]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (job,) = json.loads(done.stdout)["jobs"]
    assert 1 <= job["ratio"] < 1.05
    assert sum(moved["launches"] for moved in job["kernels"].values()) == job["launches"] > 0
