"""The kernel check: correct kernels pass; planted bugs and exceptions become failed rows."""

import dataclasses
import importlib
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch

from kernels import check, cpp
from kernels.configuration import TRITON_OPERATIONS, operations
from kernels.lamb import check as lamb_check
from kernels.numerics import Comparison
from kernels.run import Run
from tests.mutation import mutated


@pytest.fixture
def one_row(monkeypatch):
    """Replaces each check by a single comparison, so that no kernel runs; returns a function that changes one."""

    def change(op, comparisons):
        monkeypatch.setattr(importlib.import_module(f"kernels.{op}.check"), "comparisons", comparisons)

    for op in operations("torch"):
        change(op, lambda *_: iter([Comparison("tensor", 0.5, 1.0)]))
    return change


def failed(rows):
    return [row for row in rows if not row.passed]


@pytest.fixture
def launched(monkeypatch):
    """Names of kernels that have run, those of Triton with their modules."""
    executor, found = importlib.import_module("triton.runtime.interpreter").GridExecutor, set()
    run, call = executor.__call__, cpp.call

    def noted(self, *args, **options):
        found.add((self.fn.__module__, self.fn.__name__))
        run(self, *args, **options)

    monkeypatch.setattr(executor, "__call__", noted)
    monkeypatch.setattr(cpp, "call", lambda name, arguments: (found.add(name), call(name, arguments)))
    return found


def kernels_of(op, backend):
    """What `launched` has if all kernels of an operation have run."""
    if backend == "triton":
        listed = importlib.import_module(f"kernels.{op}.kernel").configurations()
        return {(each.kernel.fn.__module__, each.kernel.fn.__name__) for each in listed}
    return set(re.findall(r'^extern "C" void (\w+)', cpp.source(op), re.MULTILINE)) if backend == "cpp" else set()


def test_every_operation_passes(device, backend, launched):
    rows = check.run_checks(device, backend)
    assert [str(row) for row in failed(rows)] == []
    assert check.first_failure(rows) is None
    assert {row.op for row in rows} == set(operations(backend))
    assert all(row.seconds >= 0 for row in rows)
    number = Counter(row.op for row in rows)
    assert number["masked_cross_entropy"] > (40 if backend == "cpp" else 100)
    assert backend == "cpp" or number["span_mask"] >= 14
    for op in operations(backend):
        assert kernels_of(op, backend) <= launched, "a kernel that its check leaves out may be wrong"


def test_each_backend_has_the_operations_that_bring_its_kernels():
    package = Path(check.__file__).parent
    for backend, source in (("torch", "op.py"), ("triton", "kernel.py"), ("cpp", "kernel.cpp")):
        assert set(operations(backend)) == {file.parent.name for file in package.glob(f"*/{source}")}


def test_checks_leave_the_random_numbers_alone(device, one_row):
    def draws(device, backend, run):
        torch.manual_seed(7)
        yield Comparison("random", torch.rand(()).item(), 1.0)

    one_row("lamb", draws)
    before = torch.get_rng_state()
    check.run_checks(device)
    assert torch.equal(torch.get_rng_state(), before)


RUN = Run(
    dtype="bfloat16",
    vocab_size=320,
    row_lengths=(33, 65),
    validation_length=33,
    mask_history=False,
    lamb=True,
    buckets=False,
    attention=(1, 32, 16),
    gates=(32, 48),
    dropouts=True,
    norms=32,
    mixes=(32, 4),
)


def checked(device, **changes):
    """Names of all comparisons for a run, by operation."""
    rows = check.run_checks(device, "torch", dataclasses.replace(RUN, **changes))
    assert failed(rows) == []
    return {op: "\n".join(row.name for row in rows if row.op == op) for op in TRITON_OPERATIONS}


def test_a_run_with_all_that_there_is_has_every_operation_checked():
    assert set(RUN.operations) == set(TRITON_OPERATIONS), "an operation that Run.operations lacks runs unchecked"


def test_a_run_has_checked_what_it_launches_and_nothing_else(device):
    names = checked(device)
    assert {line.split()[1] for line in names["masked_cross_entropy"].splitlines()} == {"bfloat16"}
    assert {line.split()[2] for line in names["masked_cross_entropy"].splitlines()} == {"V=320"}
    assert "without gradient" in names["masked_cross_entropy"], "as in validation"
    lines = names["span_mask"].splitlines()
    assert {line.split()[1] for line in lines} == {"T=33", "T=65"}
    assert {line.split()[1] for line in lines if "not padded" in line} == {"T=33"}
    assert "history" not in names["span_mask"]
    assert {line.split(":")[0] for line in names["lamb"].splitlines()} == {"fp32", "a NaN in fp32"}


def test_the_check_before_a_run_runs_all_kernels_of_a_run(device, launched):
    run = dataclasses.replace(RUN, row_lengths=(17,), validation_length=17, mixes=(32, 8))
    assert failed(check.run_checks(device, "triton", run)) == []
    listed = set().union(*(kernels_of(op, "triton") for op in TRITON_OPERATIONS))
    left_out = {name for _, name in listed - launched}
    assert left_out == {"scale_kernel"}, "the backward of cross_entropy_from_logits, which no run calls"


@pytest.mark.parametrize(
    ("change", "op", "shows"),
    [
        ({"dtype": "float32"}, "masked_cross_entropy", "float32"),
        ({"vocab_size": 1009}, "masked_cross_entropy", "V=1009"),
        ({"mask_history": True}, "span_mask", "with history"),
        ({"row_lengths": (129,)}, "span_mask", "T=129"),
        ({"buckets": True}, "lamb", "unaligned gradients"),
    ],
)
def test_each_setting_of_a_run_reaches_its_check(device, change, op, shows):
    assert shows not in checked(device)[op]
    assert shows in checked(device, **change)[op]


@pytest.mark.parametrize(("gates", "has_copies"), [((32, 48), True), ((32, None), False), (None, False)])
def test_copies_are_checked_where_a_run_has_packed_weights(device, gates, has_copies):
    for run in (dataclasses.replace(RUN, gates=gates, buckets=True, dtype=dtype) for dtype in ("bfloat16", "float32")):
        results = list(lamb_check.comparisons(device, "triton", run))
        assert all(result.passed for result in results)
        copied = {result.name for result in results if result.name.endswith(": copies")}
        assert copied == ({"fp32: copies", "unaligned gradients: copies"} if has_copies else set())


def test_a_run_with_another_optimizer_does_not_check_lamb(device):
    assert checked(device, lamb=False)["lamb"] == ""


def test_a_run_is_the_same_after_a_command_line():
    assert Run.from_json(RUN.to_json()) == RUN
    for text in ("nonsense", "[]", "{}", '{"row_lengths": 3}'):
        with pytest.raises(ValueError, match=r"."):
            Run.from_json(text)


def test_operations_are_checked_at_the_same_time(device, one_row, monkeypatch):
    """Each check waits for all others, so running them one after another would deadlock."""
    monkeypatch.setattr(check, "interpreted", lambda: False)
    barrier = threading.Barrier(len(TRITON_OPERATIONS), timeout=60)

    def meets(op):
        def comparisons(*_):
            barrier.wait()
            yield Comparison(op, 0.0, 1.0)

        return comparisons

    for op in TRITON_OPERATIONS:
        one_row(op, meets(op))
    rows = check.run_checks(device)
    assert [(row.op, row.name, row.passed) for row in rows] == [(op, op, True) for op in TRITON_OPERATIONS]


MUTANTS = {
    "masked_cross_entropy": ("factor = scale * (1 + 2", "factor = scale * (1 + 1"),
    "span_mask": ("selectable & (score <= _kth_lowest", "selectable & (score < _kth_lowest"),
    "lamb": ("step_size = lr_scale * tl.load(lr_ptr) * ratio", "step_size = lr_scale * tl.load(lr_ptr)"),
}


@pytest.mark.parametrize("op", MUTANTS)
def test_a_planted_bug_fails_and_names_the_way_on(op, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["check", "--run", RUN.to_json()])
    monkeypatch.setattr(check, "operations", lambda backend: (op,))
    with mutated(f"kernels.{op}.kernel", *MUTANTS[op], tmp_path), pytest.raises(SystemExit) as error:
        check.main()
    captured = capsys.readouterr()
    assert error.value.code == 1
    assert "FAILED" in captured.out
    assert captured.err.startswith(f"kernels.check: kernel check failed: {op}, ")
    assert "--kernels torch" in captured.err
    assert "KERNELS_BACKEND=torch" in captured.err


def raises(device, backend, run=None):
    yield Comparison("before", 0.0, 1.0)
    raise RuntimeError("out of shared memory\nand a long explanation")


@pytest.mark.parametrize(
    ("comparisons", "message"),
    [
        (raises, "span_mask, check: RuntimeError: out of shared memory"),
        (
            lambda *_: iter([Comparison("ids", 3.0, 0.0)]),
            "span_mask, ids: error 3.00e+00, allowed 0.00e+00",
        ),
        (lambda *_: iter([Comparison("ids", float("nan"), 1.0)]), "span_mask, ids: error nan"),
        (lambda *_: iter([]), "span_mask, check: RuntimeError: nothing was compared"),
    ],
)
def test_whatever_goes_wrong_in_a_check_is_a_row_that_failed(comparisons, message, one_row, device):
    assert failed(check.run_checks(device)) == []
    one_row("span_mask", comparisons)
    rows = check.run_checks(device)
    assert len(failed(rows)) == 1
    assert str(failed(rows)[0]).startswith(message)
    assert check.first_failure(rows) == f"kernel check failed: {failed(rows)[0]}; {check.WAY_ON}"
    assert {row.op for row in rows} == set(TRITON_OPERATIONS)  # the other operations were still checked


def command(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "kernels.check", *arguments],
        cwd=Path(__file__).parents[1],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_command_interprets_kernels_where_there_is_no_gpu():
    done = command("--device", "cpu", "--run", RUN.to_json())  # the full set is checked above
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("backend triton on cpu in its interpreter")
    for op in TRITON_OPERATIONS:
        assert f"{op}, " in done.stdout


def test_the_command_checks_the_backend_that_it_is_told(monkeypatch, capsys, one_row):
    asked = []
    one_row("lamb", lambda device, backend, run: asked.append((device.type, backend)) or raises(device, backend))
    for arguments, seen in (([], "triton"), (["--backend", "torch"], "torch")):
        monkeypatch.setattr(sys, "argv", ["check", "--device", "cpu", *arguments])
        with pytest.raises(SystemExit):
            check.main()
        assert asked.pop() == ("cpu", seen)
        heading = capsys.readouterr().out.splitlines()[0]
        assert heading.startswith(f"backend {seen} on cpu")
        assert ("interpreter" in heading) == (seen == "triton")


def test_a_run_that_cannot_be_read_is_one_line():
    done = command("--device", "cpu", "--run", "{}")
    assert done.returncode == 1
    assert done.stderr.startswith("kernels.check: --run: no description of a run")
    assert "Traceback" not in done.stderr


def test_a_device_that_is_not_there_is_one_line():
    done = command("--device", "nonsense")
    assert done.returncode == 1
    assert done.stderr.startswith("kernels.check: --device nonsense: ")
    assert "Traceback" not in done.stderr
