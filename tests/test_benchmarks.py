"""Benchmarks refuse to report wrong results, alternate with the reference, and keep their results file intact."""

import csv
import json
import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from benchmarks import (
    bench_lamb,
    bench_masked_cross_entropy,
    bench_span_mask,
    bench_tokenize,
    bench_train_step,
    machine,
    peers,
    traffic,
)
from benchmarks.measurement import COLUMNS, Measurement, Results
from benchmarks.stopwatch import PARTS
from gptbert.command_line import run_command
from kernels.lamb import reference as lamb_reference
from kernels.numerics import Comparison
from tests.runs import MODEL

RIGHT, WRONG = Comparison("loss", 1.0, 1.0), Comparison("gradient", 2.0, 1.0)
MCE = bench_masked_cross_entropy


class FakeBenchmark:
    """Stands in for pytest-benchmark, with durations set by the test."""

    def __init__(self, times):
        self.disabled, self.extra_info, self._times = False, {}, times
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[]))

    def pedantic(self, target, *, setup, rounds):
        for round_ in range(rounds):
            setup()
            target()
            self.stats.stats.data.append(self._times[round_])


@pytest.fixture
def results():
    return Results()


@pytest.fixture
def measurement(results):
    def make(impl="torch", times=()):
        node = SimpleNamespace(callspec=SimpleNamespace(params={"impl": impl, "shape": "N=1"}), originalname="test_op")
        return Measurement(FakeBenchmark(times), SimpleNamespace(node=node), results)

    return make


@pytest.mark.parametrize("comparisons", [[WRONG], [RIGHT, WRONG]])
def test_wrong_numbers_fail_and_are_never_timed(measurement, results, comparisons):
    benchmark = measurement()
    with pytest.raises(pytest.fail.Exception, match=r"op N=1 torch: gradient: error 2.000e\+00, allowed 1.000e\+00"):
        benchmark.prove(comparisons)
    with pytest.raises(AssertionError, match="nothing was compared"):
        benchmark.time(print, None)
    assert not results.rows


def test_no_comparison_is_no_proof(measurement):
    benchmark = measurement()
    benchmark.prove([])
    with pytest.raises(AssertionError, match="nothing was compared"):
        benchmark.time(print, None)


def test_ratio_is_the_median_of_neighbors(measurement, results, monkeypatch):
    # the machine slows down fivefold after the first of three rounds: ratios are 2, 4, 4; that of the medians is 20 / 5
    reference_times = iter([2.0, 20.0, 20.0])
    warm_up = iter([1.0, 1.0])
    monkeypatch.setattr(machine, "seconds", lambda action: next(warm_up, None) or next(reference_times))
    monkeypatch.setattr(machine, "copy_rate", lambda: 100.0)
    benchmark = measurement(times=[1.0, 10.0, 5.0])
    benchmark.prove([RIGHT])
    benchmark.time(lambda: None, lambda: None, fewest_bytes=250)
    (row,) = results.rows
    assert row["rounds"] == "3"
    assert [row[f"p{percent}_ms"] for percent in (20, 50, 80)] == ["2600", "5000", "8000"]
    assert row["speed_over_reference_eager"] == "2"
    assert row["share_of_copy_bandwidth"] == "0.5"
    assert (row["op"], row["shape"], row["impl"]) == ("op", "N=1", "torch")
    assert float(row["load_before"]) == pytest.approx(results.load, rel=0.1)
    assert set(row) <= set(COLUMNS)


def test_the_reference_is_not_timed_beside_itself(measurement, results):
    turns = []
    benchmark = measurement("reference_eager", times=[1.0] * 50)
    benchmark.prove([RIGHT])
    benchmark.time(lambda: turns.append("run"), lambda: turns.append("reference"))
    assert set(turns) == {"run"}
    assert results.rows[0]["speed_over_reference_eager"] == "1"


@pytest.mark.parametrize(("impl", "is_compiled"), [("torch", False), ("reference_compiled", True)])
def test_an_implementation_is_compiled_if_its_name_says_so(measurement, monkeypatch, impl, is_compiled):
    monkeypatch.setattr(torch, "compile", lambda *_, **__: len)
    assert measurement(impl).compiled(abs) is (len if is_compiled else abs)


def test_file_keeps_other_rows_and_drops_what_failed(results, tmp_path):
    def row(op, impl, milliseconds):
        return {"op": op, "shape": "N=1", "impl": impl, "p50_ms": milliseconds}

    path = tmp_path / "results" / "machine.csv"
    results.tried = {("lamb", "N=1", impl) for impl in ("torch", "triton", "peer")}
    results.rows = [row("lamb", "torch", "1"), row("lamb", "triton", "2"), row("lamb", "peer", "3")]
    results.write(path)
    again = Results()
    again.tried = {("lamb", "N=1", "triton"), ("lamb", "N=1", "torch"), ("span_mask", "N=1", "torch")}
    again.rows = [row("span_mask", "torch", "4"), row("lamb", "torch", "5")]
    again.write(path)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["op"], row["impl"], row["p50_ms"]) for row in rows] == [
        ("lamb", "peer", "3"),
        ("lamb", "torch", "5"),
        ("span_mask", "torch", "4"),
    ]


def test_file_name_is_clean(monkeypatch):
    monkeypatch.setattr(machine, "hardware", lambda: "AMD EPYC™ 9654 (96-Core)")
    monkeypatch.setattr(machine, "usable_cores", lambda: 2)
    monkeypatch.setattr(machine, "device", lambda: torch.device("cpu"))
    assert machine.file_name() == "amd-epyc-9654-96-core-2-cores"


@pytest.mark.parametrize("impl", ["triton", "liger", "cut_cross_entropy"])
def test_kernels_are_skipped_without_a_gpu_even_in_the_interpreter(impl):
    with pytest.raises(pytest.skip.Exception, match=f"{impl} needs a GPU"):
        peers.skip_unless_possible(impl)


def passes(comparisons):
    return all(result.passed for result in comparisons)


HIDDEN_BUGS = {
    "no bias": lambda hidden, weight, labels, bias, z: MCE._reference(hidden, weight, labels, 0 * bias, z),
    "no z-loss": lambda hidden, weight, labels, bias, z: MCE._reference(hidden, weight, labels, bias, 0.0),
    "ignored rows count": lambda hidden, weight, labels, bias, z: MCE._reference(
        hidden, weight, labels.clamp(min=0), bias, z
    ),
    "gradient of hidden too large": lambda hidden, *rest: MCE._reference(1.25 * hidden - 0.25 * hidden.detach(), *rest),
    "no gradient of weight": lambda hidden, weight, *rest: MCE._reference(hidden, weight.detach() + 0 * weight, *rest),
}
LOGITS_BUGS = {
    "no z-loss": lambda logits, labels, z: MCE._reference_from_logits(logits, labels, 0.0),
    "ignored rows count": lambda logits, labels, z: MCE._reference_from_logits(logits, labels.clamp(min=0), z),
}


@pytest.mark.parametrize("impl", ["reference_eager", "torch", "linear_cross_entropy", "linear_cross_entropy_chunked"])
def test_right_cross_entropies_pass(impl):
    peers.skip_unless_possible(impl)
    assert passes(MCE.hidden_proof(MCE.IMPLEMENTATIONS[impl], MCE.TINY))


@pytest.mark.parametrize("backend", ["torch", "cpp"])
def test_right_cross_entropies_of_packed_weights_pass(backend):
    """As "triton_packed", which takes a GPU."""
    loss = partial(MCE._ours, backend=backend)
    assert passes(MCE.hidden_proof(MCE.Implementation(loss, is_packed=True), MCE.TINY))


@pytest.mark.parametrize("bug", HIDDEN_BUGS)
def test_wrong_cross_entropies_do_not_pass(bug):
    assert not passes(MCE.hidden_proof(MCE.Implementation(HIDDEN_BUGS[bug]), MCE.TINY))


@pytest.mark.parametrize("impl", ["reference_eager", "torch"])
def test_right_cross_entropies_from_logits_pass(impl):
    assert passes(MCE.logits_proof(MCE.FROM_LOGITS[impl], MCE.TINY.V))


@pytest.mark.parametrize("bug", LOGITS_BUGS)
def test_wrong_cross_entropies_from_logits_do_not_pass(bug):
    assert not passes(MCE.logits_proof(LOGITS_BUGS[bug], MCE.TINY.V))


SIZES = [(torch.Size([400, 64]), 0.1), (torch.Size([64]), 0.0)]  # gradients of norm 0.02·√25,664 > max_grad_norm
LAMB_BUGS = {
    "not clipped": ({"max_norm": None}, {}),
    "no average": ({}, {"average_decay": 1.0}),
    "another beta2": ({}, {"beta2": 0.97}),
    "all tensors decay": ({}, {"weight_decays": [0.1, 0.1]}),
}


@pytest.mark.parametrize("impl", ["reference_eager", "torch"])
def test_right_lambs_pass(impl):
    assert passes(bench_lamb.proof(bench_lamb.IMPLEMENTATIONS[impl], SIZES))


@pytest.mark.parametrize("bug", LAMB_BUGS)
def test_wrong_lambs_do_not_pass(bug):
    of_clipping, of_settings = LAMB_BUGS[bug]

    def step(tensors, clipping, settings):
        lamb_reference.lamb_step(tensors, clipping._replace(**of_clipping), settings._replace(**of_settings))

    assert not passes(bench_lamb.proof(partial(bench_lamb._reference, step=step), SIZES))


def test_models_have_both_kinds_of_weight_decay():
    decays = [decay for _, decay in bench_lamb.model_sizes("tiny")]
    assert set(decays) == {0.0, bench_lamb.WEIGHT_DECAY}


def test_masks_are_compared_to_the_bit():
    tokens, row_ids = bench_span_mask.make_rows(bench_span_mask.TINY)
    for impl in ("reference_eager", "torch"):
        assert passes(bench_span_mask.proof(bench_span_mask.IMPLEMENTATIONS[impl], tokens, row_ids))
    assert not passes(bench_span_mask.proof(lambda tokens, row_ids: (tokens, tokens), tokens, row_ids))


def test_a_case_of_the_name_goes_before_those_whose_name_contains_it():
    names = lambda text: [case.name for case in bench_train_step.matching(text, bench_train_step.CASES)]  # noqa: E731
    assert names("MLM T=128 B=32") == ["MLM T=128 B=32"]
    assert names("CLM T=128 B=3") == [case.name for case in bench_train_step.CASES if "CLM T=128 B=32" in case.name]
    assert names("") == [case.name for case in bench_train_step.CASES]
    assert names("XLM") == []


def test_a_row_of_training_steps_stands_below_its_header(capsys):
    case = max(bench_train_step.CASES, key=lambda case: len(case.name))
    parts = dict.fromkeys(PARTS, 1.0)
    result = bench_train_step.Result(case, 800.0, 5000.0, 0.5, 400.0, 20.0, 1.5, parts, 0.15, 0.1, 0.7)
    bench_train_step.show(result, with_header=True)
    header, row = capsys.readouterr().out.splitlines()
    assert len(header) == len(row)
    assert row.startswith(f"{case.name}  ")
    for title, value in (("tokens/s", "5000"), ("cross-entropy", "1"), ("(rows)", "0.7")):
        end = header.index(title) + len(title)
        assert row[:end].endswith(f" {value}")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_training_step_is_measured_in_parts_that_add_up(tmp_path, ranks):
    case = bench_train_step.Case("MLM", 32, 4, ranks)
    settings = {"steps": 3, "compile": False, "cpu_threads": 1, "rates": 0}
    config = bench_train_step.StepBenchConfig(config_file=write_model(tmp_path), **settings)
    result = bench_train_step.measure(case, config)
    assert set(result.parts) == set(PARTS)
    assert sum(result.parts.values()) == pytest.approx(result.milliseconds)
    reduction = result.parts.pop("reduction")
    assert reduction > 0.01 if ranks == 2 else reduction < 0.01
    assert all(milliseconds > 0 for milliseconds in result.parts.values())
    assert result.tokens_per_second == pytest.approx(4 * 32 / result.milliseconds * 1e3)
    assert 0 < result.mfu < 1
    assert result.peak_gb > 0.1
    assert result.rows_ms > 0


@pytest.mark.parametrize(
    ("settings", "run", "arguments", "status", "message"),
    [
        (traffic.TrafficConfig, traffic.run, ["--op", "nosuch"], 2, "invalid choice 'nosuch' for argument '--op'"),
        (traffic.TrafficConfig, traffic.run, ["--op", "lamb", "--lamb_config", "nosuch"], 1, "model config .*nosuch"),
        (bench_tokenize.BenchConfig, bench_tokenize.run, ["--input", "nosuch.jsonl"], 1, "--input nosuch.jsonl"),
        (bench_tokenize.BenchConfig, bench_tokenize.run, ["--megabytes", "x"], 2, ".*--megabytes"),
        (bench_tokenize.BenchConfig, bench_tokenize.run, ["--alternations", "0"], 1, "--alternations 0: must be"),
    ],
)  # fmt: skip
def test_bad_input_to_a_benchmark_is_one_line(capsys, settings, run, arguments, status, message):
    with pytest.raises(SystemExit) as end:
        run_command(settings, run, arguments)
    assert end.value.code == status
    assert re.fullmatch(rf"error: {message}.*\n", capsys.readouterr().err)


def write_model(folder):
    path = folder / "model.json"
    path.write_text(json.dumps(MODEL))
    return path
