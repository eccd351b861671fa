"""A GPU measurement survives parts that crash, hang or cannot run, and keeps partial results when interrupted."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import child, plan, runner
from benchmarks.gpu.__main__ import main, parse
from benchmarks.gpu.report import Report
from benchmarks.gpu.runner import DONE, FAILED, KILLED, LEFT_OUT
from benchmarks.gpu.settings import Part, Settings
from tests.runs import ROOT

LABELS = {"gpu": "A GPU", "rehearsal": True, "commit": "abc"}


def part(function, *, name=None, seconds=60.0, needs=(), **options):
    return Part(name or function, "steps", f"tests.broken_parts:{function}", seconds, options, needs)


@pytest.fixture
def measure(tmp_path):
    def run(*stages, minutes=2.0):
        report = Report(tmp_path / "out", "a-gpu", LABELS)
        settings = Settings(minutes, rehearse=True, work=tmp_path / "work")
        runner.run(stages, settings, report)
        return json.loads(report.json.read_text()), report.page.read_text()

    return run


def is_alive(process_id):
    with suppress(OSError):
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_crash_is_on_the_page_and_the_next_part_goes_on(measure, capfd):
    content, page = measure([part("crashing")], [part("aborting")], [part("right", value=8)])
    parts = content["parts"]
    assert [entry["status"] for entry in parts.values()] == [FAILED, FAILED, DONE]
    assert parts["crashing"]["result"] == {"value": 1}, "what it had found before"
    assert parts["crashing"]["message"] == "exit status 1"
    assert parts["aborting"]["message"] == f"exit status {-signal.SIGABRT}"
    assert parts["right"]["result"] == {"value": 8, "summary": "found 8"}
    assert "RuntimeError: an illegal memory access was encountered" in page
    assert "| right | done |" in page
    said = capfd.readouterr().out.splitlines()
    assert said[0].startswith("crashing: failed after ")
    assert said[-1].startswith("right: done after ")
    assert said[-1].endswith("; found 8")


def test_a_part_over_its_time_is_killed_with_all_it_started_and_its_neighbors_stay(measure, tmp_path):
    pid_file = tmp_path / "pid"
    content, page = measure(
        [part("right")],
        [part("hanging", seconds=8.0, pid_file=str(pid_file)), part("right", name="beside")],
        [part("right", name="after")],
    )
    parts = content["parts"]
    assert {name: entry["status"] for name, entry in parts.items()} == {
        "right": DONE, "hanging": KILLED, "beside": DONE, "after": DONE,
    }  # fmt: skip
    assert parts["hanging"]["result"]["summary"] == "half"
    assert "over its time of 8 s" in page
    assert not is_alive(int(pid_file.read_text()))


def test_parts_of_a_stage_run_side_by_side(measure, tmp_path):
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    content, _ = measure(
        [part("waiting_for", name="a", mine=one, other=other), part("waiting_for", name="b", mine=other, other=one)]
    )
    assert [entry["status"] for entry in content["parts"].values()] == [DONE, DONE]


def test_a_part_alone_imports_beside_the_one_before_and_waits_for_its_end(measure, tmp_path):
    times = str(tmp_path / "times")
    measure(*([part("noting", name=name, times=times)] for name in "abc"))
    events = [line.split() for line in Path(times).read_text().splitlines()]
    assert [what for what, _ in events] == ["begin", "end"] * 3
    assert [float(when) for _, when in events] == sorted(float(when) for _, when in events)


def test_a_part_is_ready_while_the_one_before_runs(measure, monkeypatch):
    seen = []

    class Noting(runner.Process):
        def prepare(self):
            seen.append(f"made {self.part.name}")
            super().prepare()

        def begin(self, seconds):
            super().begin(seconds)
            seen.append(self.part.name)

    monkeypatch.setattr(runner, "Process", Noting)
    measure(*([part("right", name=name) for name in names] for names in ("a", "b", "cd")))
    assert seen == ["made a", "a", "made b", "b", "made c", "c", "made d", "d"]


def test_what_inductor_chose_beside_others_is_forgotten(measure, tmp_path):
    choice, code = (tmp_path / "work" / "inductor" / "ab" / name for name in ("x.best_config", "x.py"))
    choice.parent.mkdir(parents=True)
    for file in (choice, code):
        file.touch()
    measure([part("right")])
    assert choice.exists()
    measure([part("right"), part("right", name="beside")])
    assert (choice.exists(), code.exists()) == (False, True)


def test_logs_are_beside_the_page(measure, tmp_path):
    measure([part("crashing")])
    with tarfile.open(tmp_path / "out" / "a-gpu-logs.tar.gz") as archive:
        assert b"on the way" in archive.extractfile("./crashing.log").read()


@pytest.mark.parametrize(("changes", "is_kept"), [({"date": "later"}, True), ({"commit": "def"}, False), (None, False)])
def test_a_later_report_of_the_same_commit_adds_to_the_page(tmp_path, changes, is_kept):
    entry = {"status": DONE, "seconds": 1.0, "message": "", "result": {"summary": "found"}}
    Report(tmp_path, "a-gpu", LABELS).put("a", entry)
    later = Report(tmp_path, "a-gpu", LABELS | (changes or {}), adds=changes is not None)
    later.put("b", entry)
    assert list(json.loads(later.json.read_text())["parts"]) == (["a", "b"] if is_kept else ["b"])


def test_a_part_without_its_package_is_left_out_and_says_so(measure, capfd):
    content, page = measure([part("right", needs=("torch", "no_such_package_1")), part("right", name="beside")])
    left_out = content["parts"]["right"]
    assert (left_out["status"], left_out["message"]) == (LEFT_OUT, "no_such_package_1 is not installed")
    assert "| right | left out | 0.0 | no_such_package_1 is not installed |" in page
    assert content["parts"]["beside"]["status"] == DONE
    assert "right: left out after 0.0 s: no_such_package_1 is not installed" in capfd.readouterr().out


def test_when_the_time_is_over_no_part_begins(measure):
    content, _ = measure([part("right")], minutes=0.05)
    assert content["parts"]["right"]["message"] == "the 0.05 minutes were over"


def test_more_minutes_are_more_time_and_fewer_are_not_less(tmp_path):
    def seconds(minutes):
        settings = Settings(minutes, rehearse=False, work=tmp_path)
        return runner.limit(part("right", seconds=100.0), settings, time.monotonic() + 60 * minutes)

    assert seconds(8) == seconds(4) == 100.0
    assert seconds(16) == 200.0
    assert 58 < seconds(1) <= 60, "what is left"


def test_repetitions_follow_the_minutes():
    times = [Settings(minutes, rehearse=False, work=ROOT).times(8, 2) for minutes in (1, 4, 8, 16)]
    assert times == [2, 4, 8, 16]
    assert Settings(16, rehearse=True, work=ROOT).times(8, 2) == 2


@pytest.fixture
def hanging_measurement(tmp_path):
    """A measurement whose second part hangs; with its output folder and the id of the part's child process."""
    pid_file, out = tmp_path / "pid", tmp_path / "out"
    stages = [[part("right")], [part("hanging", seconds=500.0, pid_file=str(pid_file))]]
    code = (
        "import sys\n"
        "from benchmarks.gpu import __main__ as command\n"
        "from benchmarks.gpu.settings import Part\n"
        f"command.chosen = lambda only: {stages!r}\n"
        f"command.main(['--rehearse', '--output', {str(out)!r}])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: pid_file.exists() and pid_file.read_text())
        yield process, out, int(pid_file.read_text())
    finally:
        process.kill()
        process.communicate()


def test_results_are_on_the_disk_while_a_part_still_runs_and_a_signal_ends_all(hanging_measurement):
    """As if the machine were taken back."""
    process, out, beside = hanging_measurement
    file = out / "rehearsal.json"
    wait_until(lambda: json.loads(file.read_text())["parts"].get("hanging", {}).get("result"))
    parts = json.loads(file.read_text())["parts"]
    assert parts["right"]["status"] == DONE
    assert parts["hanging"]["status"] == "running"
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    parts = json.loads(file.read_text())["parts"]
    assert parts["hanging"] | {"seconds": 0, "log": []} == {
        "status": KILLED, "seconds": 0, "message": "the measurement was stopped", "log": [],
        "result": {"value": 1, "summary": "half"},
    }  # fmt: skip
    assert not is_alive(beside)
    assert "half" in (out / "rehearsal.md").read_text()


def test_nothing_is_left_when_the_measurement_itself_is_killed(hanging_measurement):
    process, out, beside = hanging_measurement
    assert is_alive(beside)
    process.kill()
    wait_until(lambda: not is_alive(beside))
    assert json.loads((out / "rehearsal.json").read_text())["parts"]["right"]["status"] == DONE


def test_a_reader_never_finds_half_a_file(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    child.write(path, {"value": 1})
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        child.write(path, {"value": 2})
    assert json.loads(path.read_text()) == {"value": 1}


def test_every_part_of_the_plan_can_be_called_and_has_a_name_of_its_own():
    import importlib  # noqa: PLC0415

    parts = [each for stage in plan.stages() for each in stage]
    assert len({each.file_name for each in parts}) == len(parts)
    assert {each.group for each in parts} == set(plan.GROUPS)
    for each in parts:
        module, function = each.target.split(":")
        assert callable(getattr(importlib.import_module(module), function)), each.target
        assert json.loads(json.dumps(each.options)) == each.options
        assert not runner.missing(each), "the development environment has everything"


def test_what_is_timed_is_alone_and_comes_after_what_compiles():
    stages = plan.stages()
    compiled = next(i for i, stage in enumerate(stages) if any("compiling" in each.name for each in stage))
    timed = [
        i for i, stage in enumerate(stages) if any(each.name.startswith(("steps", "operations")) for each in stage)
    ]
    assert all(len(stages[i]) == 1 and i > compiled for i in timed)
    assert len(timed) == 6


def test_only_picks_groups_with_what_compiles_for_them():
    assert [[each.name for each in stage] for stage in plan.chosen(["operations"])] == [
        ["compiling operations"],
        ["operations"],
    ]
    assert {each.group for stage in plan.chosen(["steps", "check"]) for each in stage} == {"steps", "check"}
    assert plan.chosen([]) == plan.stages()


@pytest.mark.parametrize("arguments", [["--only", "steps,nothing"], ["--minutes", "0"], ["--minute", "3"]])
def test_bad_flags_are_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        parse(arguments)
    assert end.value.code == 2
    assert arguments[0] in capsys.readouterr().err.splitlines()[-1]


def test_without_a_gpu_one_line_names_the_rehearsal(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="torch sees no GPU; --rehearse"):
        main([])


def test_the_command_needs_only_torch_and_numpy(tmp_path):
    """On a bare machine, parts that need other packages are skipped."""
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    hidden = ("tyro", "pytest", "tokenizers", "safetensors", "tqdm", "wandb", "triton", "jinja2", "matplotlib")
    (blocked / "sitecustomize.py").write_text(
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name in {hidden!r}:\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "import importlib.util\n"
        "find = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda name, package=None: None if name in {hidden!r} else find(name, package)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--output", str(tmp_path / "out")],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(blocked)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()[1:]
    assert lines[0].startswith("machine: done after")
    assert len(lines) > 10
    assert all(": left out after 0.0 s: " in line for line in lines[1:]), done.stdout
    assert "tyro and safetensors and tokenizers and tqdm are not installed" in done.stdout
