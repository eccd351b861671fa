"""Each part of a GPU measurement, rehearsed on the CPU at toy sizes; GPU-only queries are replaced by stubs."""

import dataclasses
import json
import os
import signal
import subprocess
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest
import torch
from safetensors.torch import save_file
from torch._dynamo.utils import counters
from torch.autograd import DeviceType

from benchmarks import machine
from benchmarks.gpu import check, hardware, lane, operations, plan, resume, runner, soak, steps
from benchmarks.gpu.cases import CASES, README_COMMAND, WAYS
from benchmarks.gpu.page import page
from benchmarks.gpu.profile import SLOWEST, profile
from benchmarks.gpu.profile import figures as profile_figures
from benchmarks.gpu.report import Report
from benchmarks.gpu.settings import Settings
from gptbert.checkpoint.folder import checkpoint_dir
from gptbert.data.hybrid_plan import HybridPlan
from gptbert.data.micro_batch import MicroBatches
from gptbert.distributed.world import World
from gptbert.model.objective import Objective
from kernels.backend import chosen_by_name, set_default_backend
from kernels.numerics import Comparison
from kernels.wanted import FUSED, use_fused

REHEARSED = (
    *("machine", "check", f"steps {README_COMMAND.name}", "operations", "check before a run", "soak"),
    "resume, not compiled",
)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """With a time budget that suffices on any machine."""
    return Settings(minutes=60.0, rehearse=True, work=tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def report(settings):
    """Report of a rehearsal in the command's own processes; one training case of five, nothing compiled."""
    report = Report(settings.work / "out", "rehearsal", hardware.labels(settings))
    stages = [[part for part in stage if part.name in REHEARSED] for stage in plan.stages()]
    runner.run([stage for stage in stages if stage], settings, report)
    return json.loads(report.json.read_text())


def result_of(report, name):
    entry = report["parts"][name]
    assert entry["status"] == runner.DONE, entry
    return entry["result"]


def test_all_parts_end_and_are_on_the_page(report):
    assert list(report["parts"]) == [part.name for stage in plan.stages() for part in stage if part.name in REHEARSED]
    text = page(report)
    for name in REHEARSED:
        assert result_of(report, name)["summary"] in text


def test_the_report_says_what_it_is_of(report):
    assert report["torch"] == torch.__version__
    assert report["rehearsal"]
    assert report["gpu"] == machine.hardware()
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=hardware.ROOT, capture_output=True, text=True, check=False)
    if head.returncode == 0:
        assert head.stdout.startswith(report["commit"].removesuffix("-dirty"))


def test_the_commit_can_be_named_where_there_is_no_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert hardware.commit() == "unknown"
    monkeypatch.setenv("GPTBERT_COMMIT", "abc123")
    assert hardware.commit() == "abc123"


def test_a_step_has_all_its_figures_in_every_way(report):
    found = result_of(report, f"steps {README_COMMAND.name}")
    assert found["case"] == {"model": "base_32k", "objective": "hybrid", "rows": 32, "seq_length": 128}
    for way in WAYS:
        figures = found[way]
        tokens = steps.TOY_ROWS * README_COMMAND.seq_length // 4
        assert figures["tokens_per_second"] * figures["ms"] == pytest.approx(1e3 * tokens)
        assert figures["ms"] == sorted(figures["rounds_ms"])[1]
        for name in ("mfu", "product_tflops", "host_ms", "busy_ms", "peak_gb", "first_step_seconds"):
            assert figures[name] > 0, name
        assert 0.5 < figures["labeled_fraction"] < 1, "a quarter of the rows is masked"
        assert figures["mfu_data_sheet"] is None
        assert len(figures["kernels"]) == SLOWEST
        assert figures["launches"] > 100
        times = [kernel["ms"] for kernel in figures["kernels"]]
        assert times == sorted(times, reverse=True)


def test_operations_stand_beside_each_other(report):
    rows = result_of(report, "operations")["rows"]
    assert {name.split()[0] for name in rows} == {
        "masked_cross_entropy", "attention", "mixes", "gated_norm", "embedding", "cross_entropy_from_logits", "lamb",
        "span_mask",
    }  # fmt: skip
    (cross_entropy,) = (found for name, found in rows.items() if name.startswith("masked_cross_entropy"))
    assert rows["lamb tiny"]["optimizer"]["ms"] > 0
    for impl in ("eager", "reference_eager", "reference_compiled", "torch"):
        assert all(cross_entropy[impl][name] > 0 for name in ("ms", "host_ms", "busy_ms", "launches")), impl
    assert "needs a GPU" in cross_entropy["triton"]["left_out"]
    assert not [row for found in rows.values() for row in found.values() if "failed" in row]


def test_checks_pass_and_runs_resume_and_soak(report):
    check = result_of(report, "check")
    assert check["failed"] == 0 < check["comparisons"]
    assert set(result_of(report, "check before a run")) >= {"cold_seconds", "warm_seconds"}
    resumed = result_of(report, "resume, not compiled")
    assert resumed["differing"] == 0
    assert resumed["tensors"] > 50
    assert resume.STEPS // 2 <= resumed["killed_at_step"] < resume.STEPS
    soaked = result_of(report, "soak")
    assert soaked["steps"] == 3 * soak.RECORD_EVERY
    assert soaked["last_loss"] > 0


def test_without_code_everything_is_still_traced():
    class Doubled(torch.nn.Module):
        def forward(self, x):
            return 2 * x

    module = Doubled()
    with steps.without_code(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch._inductor.compile_fx.compile_fx", lambda *_, **__: pytest.fail("made code"))
        module.compile(fullgraph=True)
        counters.clear()
        assert module(torch.ones(2)).tolist() == [2.0, 2.0]
    assert counters["stats"]["unique_graphs"] == 1


def event(name, milliseconds, count=1, kind=DeviceType.CUDA, is_user_annotation=False):
    return SimpleNamespace(
        key=name, count=count, device_type=kind, is_user_annotation=is_user_annotation,
        self_device_time_total=1e3 * milliseconds, self_cpu_time_total=1e3 * milliseconds,
    )  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_all_steps_of_a_case_have_one_shape(settings, case):
    """A change of shape is recorded anew, and so a step without a graph among those that are timed."""
    measured = steps.TrainingSteps(case, dataclasses.replace(settings, rehearse=False), "ours", 300)
    config = dataclasses.replace(measured.config, cuda_graph="on")
    micro_batches = MicroBatches(config, HybridPlan(config, 1), World(0, 1, torch.device("cuda", 0)))

    def shape(step):
        rows = micro_batches.padded_rows(step)
        labels = torch.empty(sum(rows.values()), case.seq_length, device="meta")
        batch = SimpleNamespace(labels=labels, num_masked=rows.get(Objective.MLM, 0))
        return tuple(rows.items()), micro_batches._most_labels(batch, step)

    assert len({shape(step) for step in range(300)}) == 1


def test_the_check_before_a_run_is_that_of_a_run(monkeypatch):
    """With the fused operations, which a run wants before it says what is to be checked."""
    checked = []
    monkeypatch.setattr(check, "prepare_kernels", lambda *_: use_fused(FUSED) or "triton")
    monkeypatch.setattr(check, "connect", lambda _: nullcontext(World(0, 1, torch.device("cuda", 0))))
    monkeypatch.setattr(check, "kernel_check", lambda run, *_: checked.append(run) or nullcontext(lambda: None))
    monkeypatch.setattr(machine, "synchronize", lambda: None)
    assert check.seconds_before_a_run() >= 0
    assert set(FUSED) <= set(checked[0].operations)


def test_a_profile_is_of_one_step_and_of_kernels_alone():
    events = [
        event("gemm", 3.0, count=6),
        event("Memcpy DtoD (Device -> Device)", 6.0, count=3),
        event("Optimizer.step#Lamb.step", 100.0, is_user_annotation=True),
        event("cudaLaunchKernel", 50.0, count=9, kind=DeviceType.CPU),
        *(event(f"small {number}", 0.003, count=3) for number in range(40)),
    ]
    found = profile_figures(events, DeviceType.CUDA, times=3)
    assert found["busy_ms"] == pytest.approx(3.0 + 40 * 0.001)
    assert found["launches"] == 2 + 1 + 40
    assert [kernel["name"] for kernel in found["kernels"][:2]] == ["Memcpy DtoD (Device -> Device)", "gemm"]
    assert found["kernels"][1] == {"name": "gemm", "ms": 1.0, "calls": 2.0}
    assert len(found["kernels"]) == SLOWEST


def test_the_profiler_tells_pytorchs_events_apart():
    """The event kinds that `figures` reads."""
    weight = torch.nn.Parameter(torch.ones(8, 8))
    optimizer = torch.optim.SGD([weight])

    def action():
        (weight @ weight).sum().backward()
        optimizer.step()  # a user annotation, not an operation

    found = profile(action, times=2)
    names = {kernel["name"]: kernel["calls"] for kernel in found["kernels"]}
    assert names["aten::mm"] == 3
    assert not [name for name in names if "Optimizer.step" in name]


def test_fields_of_nvidia_smi_are_read_or_left_out(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text('#!/bin/sh\necho "$@" > "$0.arguments"\necho "580.159.04, 1980, 1980, 2619, 700.00, 41"\n')
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = hardware.smi()
    assert found["driver"] == "580.159.04"
    assert found["temperature °C"] == "41"
    assert list(found) == list(hardware.SMI_FIELDS)
    assert "--query-gpu=driver_version,clocks.sm," in (tmp_path / "nvidia-smi.arguments").read_text()
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert hardware.smi() == {}
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert hardware.smi() == {}


def test_a_gpus_properties_and_data_sheet_are_found(monkeypatch):
    properties = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", total_memory=85e9, multi_processor_count=132, major=9, minor=0
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(hardware, "smi", dict)
    found = hardware.gpu_properties()
    assert found["multiprocessors"] == 132
    assert found["capability"] == "9.0"
    assert hardware.data_sheet_flops(found["gpu"]) == 989.4e12
    assert hardware.data_sheet_flops("NVIDIA H100 PCIe") == 756e12
    assert hardware.data_sheet_flops("AMD EPYC") is None


@pytest.fixture
def gpu_memory(monkeypatch):
    """Replaces PyTorch's GPU memory functions by fixed numbers."""
    monkeypatch.setattr(machine, "device", lambda: torch.device("cuda"))
    for name, value in {"memory_allocated": 10, "max_memory_allocated": 30, "memory_reserved": 40}.items():
        monkeypatch.setattr(torch.cuda, name, create_autospec(getattr(torch.cuda, name), return_value=value))
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, create_autospec(getattr(torch.cuda, name)))


@pytest.mark.usefixtures("gpu_memory")
def test_memory_of_a_gpu_is_asked_for():
    found = soak.memory()
    assert {name: found[name] for name in ("allocated", "highest", "reserved")} == {
        "allocated": 10, "highest": 30, "reserved": 40,
    }  # fmt: skip
    torch.cuda.synchronize.assert_called()


def test_the_slope_is_of_memory_over_steps_after_a_warm_up():
    samples = [{"step": 10 * n, "host": 5e9 if n == 1 else 1e9 + 2e3 * 10 * n} for n in range(1, 13)]
    found = soak._found(samples, [7.0, 6.0])
    assert found["slope_mb"]["host"] == pytest.approx(2.0)
    assert (found["steps"], found["first_loss"], found["last_loss"]) == (120, 7.0, 6.0)


def job(proof=None, run=lambda: None):
    return operations.Job("op", "impl", lambda: (run, proof))


def test_wrong_numbers_have_no_time(settings):
    row = operations._row(job(lambda: iter([Comparison("ok", 1, 2), Comparison("dW", 3.0, 2.0)])), settings)
    assert row == {"failed": "dW: error 3.00e+00, allowed 2.00e+00"}
    right = operations._row(job(lambda: iter([Comparison("ok", 1, 2)]), lambda: torch.ones(3).add_(1)), settings)
    assert right["ms"] > 0


def test_a_peer_that_raises_is_a_line_but_a_dead_gpu_ends_the_part(settings, monkeypatch):
    def run():
        raise RuntimeError("no kernel image\nmore")

    def refuse():
        pytest.skip("not here")

    assert operations._row(job(run=run), settings) == {"failed": "RuntimeError: no kernel image"}
    assert operations._row(job(run=refuse), settings) == {"left_out": "not here"}

    def dead():
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(machine, "synchronize", dead)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        operations._row(job(run=run), settings)


def test_what_is_slow_to_compile_is_measured_only_when_it_was_compiled_before(tmp_path, monkeypatch):
    settings = Settings(8.0, rehearse=True, work=tmp_path)
    slow = operations.Job("lamb small", operations.COMPILED, lambda: (lambda: torch.ones(3).add_(1), None))
    monkeypatch.setattr(operations, "jobs", lambda _: iter([slow]))

    def row():
        return list(operations.measure(settings, "before"))[-1]["rows"][slow.operation][slow.impl]

    assert row() == {"left_out": "it was not compiled before (before)"}
    *_, found = operations.compile_first(settings)
    assert set(found["seconds"]) == {slow.name}
    settings.result("before").parent.mkdir()
    settings.result("before").write_text(json.dumps(found))
    assert row()["ms"] > 0


def test_sizes_on_a_gpu_are_those_that_bars_ask_for(tmp_path):
    jobs = list(operations.jobs(Settings(8.0, rehearse=False, work=tmp_path)))
    names = {job.operation for job in jobs}
    assert {"masked_cross_entropy N=4096 D=768 V=32768", "lamb small", "span_mask B=256 T=520"} <= names
    assert jobs[-1].operation.startswith("lamb")
    assert jobs[-1].impl == operations.COMPILED, "what takes minutes to compile is last"


@pytest.mark.parametrize(
    ("change", "differing"),
    [
        ({}, []),
        ({"w": torch.tensor([1.0, -0.0])}, ["model.safetensors/w"]),
        ({"w": torch.tensor([1.0, 0.0], dtype=torch.float64)}, ["model.safetensors/w"]),
        ({"x": torch.zeros(1)}, ["model.safetensors/x"]),
    ],
)
def test_checkpoints_are_compared_to_the_bit(tmp_path, change, differing):
    tensors = {"w": torch.tensor([1.0, 0.0]), "nan": torch.tensor([float("nan")])}
    for name, content in {"one": tensors, "other": tensors | change}.items():
        (tmp_path / name).mkdir()
        save_file(content, tmp_path / name / "model.safetensors")
    assert resume.compare(tmp_path / "one", tmp_path / "other")[1] == differing


@pytest.mark.parametrize(("reached", "ends"), [(resume.STEPS // 2, True), (resume.STEPS, False)])
def test_a_run_that_ended_before_it_was_killed_proves_nothing(tmp_path, reached, ends):
    checkpoint_dir(tmp_path, reached).mkdir(parents=True)
    sleeping = subprocess.Popen(["sleep", "20"])
    if ends:
        assert resume._kill_after(sleeping, tmp_path, reached) == reached
    else:
        with pytest.raises(RuntimeError, match="has ended"):
            resume._kill_after(sleeping, tmp_path, reached)
    assert sleeping.returncode == -signal.SIGKILL


@pytest.mark.parametrize("way", WAYS)
def test_each_way_has_its_kernels(settings, way):
    try:
        steps.TrainingSteps(README_COMMAND, settings, way, 1)
        assert chosen_by_name() == ("torch" if way == "plain" else None)
    finally:
        set_default_backend(None)


@pytest.mark.parametrize("rehearse", [True, False], ids=["one process", "several"])
def test_tests_are_counted_as_they_end(tmp_path, monkeypatch, rehearse):
    folder = tmp_path / lane.FOLDER
    folder.mkdir(parents=True)
    (folder / "test_some.py").write_text(
        "import os, pytest\n"
        "def test_right(): assert os.environ['GPTBERT_TEST_DEVICE'] == 'cuda'\n"
        "@pytest.mark.parametrize('x', [1, 2])\n"
        "def test_wrong(x): assert x == 1\n"
        "def test_skipped(): pytest.skip('no')\n"
    )
    monkeypatch.setattr(lane, "ROOT", tmp_path)
    monkeypatch.setattr(lane, "WORKERS", 2)
    found = list(lane.measure(Settings(8.0, rehearse=rehearse, work=tmp_path)))
    assert len(found) == 5, "each test, and the end"
    assert found[-1]["outcomes"] == {"passed": 2, "failed": 1, "skipped": 1}
    assert found[-1]["failed"] == 1
    assert found[-1]["failures"] == ["tests/gpu/test_some.py::test_wrong[2]"]
    assert any("assert 2 == 1" in line for line in found[-1]["output"])
    assert all("failed" not in each for each in found[:-1]), "a lane that is killed has not said how many failed"
    (folder / "test_some.py").write_text("def test_right(): pass\n")
    assert list(lane.measure(Settings(8.0, rehearse=rehearse, work=tmp_path)))[-1]["failed"] == 0
    (folder / "test_some.py").write_text("import pytest\ndef test_skipped(): pytest.skip('no')\n")
    *_, found = lane.measure(Settings(8.0, rehearse=rehearse, work=tmp_path))
    assert "failed" not in found, "where all are skipped, none has passed"
    (folder / "test_some.py").unlink()
    assert "no tests" in next(lane.measure(Settings(8.0, rehearse=True, work=tmp_path)))["summary"]
