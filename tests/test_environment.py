"""Variables of the environment: empty, absent, absurd and contradictory ones."""

import os
import pwd
import re
import socket
import subprocess
import sys
import tempfile

import pytest
import torch

from gptbert.command_line import run_command
from gptbert.config import TrainConfig
from gptbert.distributed.world import Launch, World, choose_device, connect, read_launch
from gptbert.errors import InputError
from gptbert.export import ExportConfig, export
from gptbert.io import environment
from gptbert.scoring.trained_model import ModelChoice, TrainedModel
from gptbert.training.preparation import log_choices, prepare_kernels
from kernels import assembler
from kernels.backend import choose_backend, interpreted

LAUNCH = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
MASTER = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
ABSURD = ("", "abc", "-1", "1e3", "1.5", "٣", "9" * 30, "0x1", "1 2")


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in (*LAUNCH, *MASTER, "KERNELS_BACKEND", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)


def set_all(monkeypatch, variables):
    for name, value in variables.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Launch()),
        ({"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": ""}, Launch()),
        ({"WORLD_SIZE": "1"}, Launch()),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}, Launch()),
        (LAUNCH | MASTER, Launch(1, 2, 1, 2)),
        (LAUNCH | MASTER | {"LOCAL_WORLD_SIZE": None}, Launch(1, 2, 1, 2)),
        ({"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"} | MASTER, Launch(9, 16, 1, 8)),
    ],
)
def test_what_torchrun_says(monkeypatch, variables, expected):
    set_all(monkeypatch, variables)
    assert read_launch() == expected


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "1"}, "RANK is 1, and WORLD_SIZE is not set; torchrun sets both, and without torchrun both must be"),
        ({"RANK": "0"}, "RANK is 0, and WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE is 4, and RANK is not set"),
        ({"LOCAL_RANK": "3"}, "LOCAL_RANK is 3, and RANK is not set"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "RANK is 1, and LOCAL_RANK is not set"),
        (LAUNCH | {"RANK": "2"}, "RANK is 2, expected one below WORLD_SIZE 2; torchrun sets it"),
        (LAUNCH | {"LOCAL_RANK": "2"}, "LOCAL_RANK is 2, expected one below LOCAL_WORLD_SIZE 2"),
        (LAUNCH | {"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE is 3, expected at most WORLD_SIZE 2"),
        (LAUNCH | {"WORLD_SIZE": "0"}, "WORLD_SIZE is '0', expected a whole number from 1"),
        (LAUNCH | MASTER | {"MASTER_PORT": "99999"}, "MASTER_PORT is '99999', expected a whole number from 1 to 65535"),
        (LAUNCH | MASTER | {"MASTER_PORT": "0"}, "MASTER_PORT is '0', expected"),
        (LAUNCH | MASTER | {"MASTER_PORT": ""}, "MASTER_PORT is not set, and WORLD_SIZE is 2"),
        (LAUNCH | MASTER | {"MASTER_ADDR": ""}, "MASTER_ADDR is not set, and WORLD_SIZE is 2"),
        *(
            (LAUNCH | MASTER | {name: value}, f"^{name} is {re.escape(repr(value[:100]))}, expected a whole number")
            for name in (*LAUNCH, "MASTER_PORT")
            for value in ABSURD[1:]
        ),
    ],
)
def test_launches_that_cannot_be_are_one_line(monkeypatch, variables, message):
    set_all(monkeypatch, variables)
    with pytest.raises(InputError, match=message):
        read_launch()


@pytest.mark.parametrize("variables", [{"RANK": "1"}, {"LOCAL_RANK": "abc"}, {"LOCAL_RANK": "3"}, {"WORLD_SIZE": "x"}])
def test_a_run_ends_with_that_line(monkeypatch, make_config, capfd, variables):
    set_all(monkeypatch, variables)
    monkeypatch.setattr(os, "_exit", lambda status: (_ for _ in ()).throw(SystemExit(status)))
    required = [f"--{name}=x" for name in ("train_path", "valid_path", "config_file", "tokenizer_path")]
    with pytest.raises(SystemExit) as end:
        run_command(TrainConfig, lambda _: read_launch(), required, under_torchrun=True)
    assert end.value.code == 1
    (line,) = capfd.readouterr().err.splitlines()
    name, value = next(iter(variables.items()))
    assert name in line
    assert value in line


@pytest.mark.parametrize("left_over", [{"LOCAL_RANK": "2"}, {"RANK": "x"}, LAUNCH])
@pytest.mark.parametrize(
    ("arguments", "said", "status"),
    [
        ([], "error: missing RUN", 2),
        (["a", "b", "--license", "?"], "error: --license", 1),
        (["a", "b"], "error: a: ", 1),
    ],
)
def test_a_variable_that_was_left_over_silences_no_command(monkeypatch, capfd, left_over, arguments, said, status):
    set_all(monkeypatch, left_over)
    with pytest.raises(SystemExit) as end:
        run_command(ExportConfig, export, arguments)
    assert end.value.code == status
    assert capfd.readouterr().err.startswith(said)


def test_the_help_is_shown_whatever_was_left_over(monkeypatch, capsys):
    set_all(monkeypatch, LAUNCH)
    with pytest.raises(SystemExit):
        run_command(ExportConfig, export, ["--help"])
    assert "--shift_masked_logits" in capsys.readouterr().out


@pytest.mark.parametrize("value", ["soon", "-3", "0", "inf", "nan", "1,5"])
def test_seconds(monkeypatch, value):
    monkeypatch.setenv("SOME", value)
    with pytest.raises(InputError, match=f"^SOME is '{value}', expected a positive number of seconds; unset it"):
        environment.seconds("SOME")
    monkeypatch.setenv("SOME", "2.5")
    assert environment.seconds("SOME") == 2.5
    monkeypatch.setenv("SOME", " ")
    assert environment.seconds("SOME") is None


@pytest.mark.parametrize("name", ["TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"])
def test_folders_of_compilers(monkeypatch, tmp_path, make_config, name):
    world = World(0, 1, torch.device("cpu"))
    (tmp_path / "file").touch()
    for value, message in (("", "is empty"), (str(tmp_path / "file" / "x"), "a folder that cannot be written")):
        monkeypatch.setenv(name, value)
        with pytest.raises(InputError, match=f"^{name} {message}" if not value else f"^{name} is '.*', {message}"):
            prepare_kernels(make_config(), world)
    monkeypatch.setenv(name, str(tmp_path / "new" / "cache"))
    assert prepare_kernels(make_config(), world) == "torch"


def test_an_absent_folder_for_temporary_files_is_said_and_replaced(monkeypatch, tmp_path, make_config, capfd):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "absent"))
    world = World(0, 1, torch.device("cpu"))
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
        prepare_kernels(make_config(), world)
        said = capfd.readouterr().err
        assert (
            f"TMPDIR is '{tmp_path / 'absent'}', a folder that cannot be written; temporary files go to {tmp_path}"
            in said
        )
        assert os.environ["TMPDIR"] == str(tmp_path)
        prepare_kernels(make_config(), world)
        assert capfd.readouterr().err == ""

    def none():
        raise FileNotFoundError(2, "No usable temporary directory found")

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "gettempdir", none)
        with pytest.raises(InputError, match=r"^TMPDIR: No usable temporary directory"):
            prepare_kernels(make_config(), world)


def test_programs_that_need_a_home_get_one(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/here")
    environment.provide_home(tmp_path)
    assert os.environ["HOME"] == "/here"
    monkeypatch.delenv("HOME")
    environment.provide_home(tmp_path)
    assert os.environ["HOME"] == pwd.getpwuid(os.getuid()).pw_dir
    monkeypatch.setenv("HOME", "")
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)
    environment.provide_home(tmp_path)
    assert os.environ["HOME"] == str(tmp_path)


def test_the_device_that_was_chosen_is_said(make_config, capfd, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    for name in ("OMP_NUM_THREADS", "RANK"):
        monkeypatch.delenv(name, raising=False)
    log_choices(make_config(), World(0, 1, torch.device("cpu")), "compiled")
    assert "on the CPU, since " in capfd.readouterr().err
    log_choices(make_config(device="cpu"), World(0, 1, torch.device("cpu")), "compiled")
    assert "on the CPU, 1 thread a process (--device, --cpu_threads)" in capfd.readouterr().err
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    log_choices(make_config(device="cpu"), World(0, 1, torch.device("cpu")), "compiled")
    assert "on the CPU, 3 threads a process (--device, --cpu_threads)\n" in capfd.readouterr().err
    for named, rank, said in (("12", None, "; OMP_NUM_THREADS, which is '12', does not count"), ("1", "0", "")):
        monkeypatch.setenv("OMP_NUM_THREADS", named)
        if rank:
            monkeypatch.setenv("RANK", rank)
        log_choices(make_config(device="cpu"), World(0, 1, torch.device("cpu")), "compiled")
        assert f"(--device, --cpu_threads){said}\n" in capfd.readouterr().err


@pytest.mark.parametrize(("threads", "policy"), [(1, "passive"), (3, "active"), (3, "passive")])
def test_that_threads_sleep_is_said_where_they_do(make_config, capfd, monkeypatch, threads, policy):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    log_choices(make_config(device="cpu"), World(0, 1, torch.device("cpu")), "compiled")
    is_said = "threads sleep while they wait for each other (OMP_WAIT_POLICY=active" in capfd.readouterr().err
    assert is_said == (threads > 1 and policy == "passive")


def test_a_gpu_that_a_variable_hides_is_explained(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "nine")
    with pytest.raises(InputError, match=r"--device cuda: torch sees no GPU \(CUDA_VISIBLE_DEVICES is 'nine'\)"):
        choose_device("cuda")


@pytest.mark.skipif(sys.platform != "linux", reason="asks GNU's OpenMP, which torch brings on Linux")
@pytest.mark.parametrize(("value", "expected"), [(None, "0"), ("active", "30000000000")])
def test_waiting_threads_sleep_unless_the_user_says_otherwise(monkeypatch, value, expected):
    set_all(monkeypatch, {"OMP_WAIT_POLICY": value, "OMP_DISPLAY_ENV": "verbose", "GOMP_SPINCOUNT": None})
    run = subprocess.run([sys.executable, "-c", "import gptbert, torch"], capture_output=True, text=True, check=True)
    assert f"GOMP_SPINCOUNT = '{expected}'" in run.stderr


@pytest.mark.parametrize(
    ("platform", "value", "expected"), [("darwin", None, "1"), ("darwin", "0", "0"), ("linux", None, "")]
)
def test_what_apples_gpu_lacks_is_computed_by_the_cpu(monkeypatch, platform, value, expected):
    set_all(monkeypatch, {"PYTORCH_ENABLE_MPS_FALLBACK": value})
    variable = "os.getenv('PYTORCH_ENABLE_MPS_FALLBACK', '')"
    ask = f"import os, sys; sys.platform = {platform!r}; import gptbert; print({variable})"
    run = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == expected


def test_network_interfaces_are_those_of_the_host(monkeypatch, make_config):
    _, first = socket.if_nameindex()[0]
    for value in ("", first, f"{first},{first}"):
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", value)
        environment.check_interfaces("GLOO_SOCKET_IFNAME")
    for name, value in (LAUNCH | MASTER | {"GLOO_SOCKET_IFNAME": "eth99"}).items():
        monkeypatch.setenv(name, value)
    line = r"GLOO_SOCKET_IFNAME is 'eth99', expected a network interface of this host \(.*\); or unset it"
    with pytest.raises(InputError, match=line), connect(make_config(device="cpu", cpu_threads=1, huge_pages=False)):
        pass


@pytest.mark.parametrize("value", ["x", "Torch", "cuda"])
def test_a_backend_that_there_is_not_is_one_line_everywhere(monkeypatch, make_config, tmp_path, value):
    monkeypatch.setenv("KERNELS_BACKEND", value)
    message = rf"KERNELS_BACKEND='{value}': this version has torch, triton, cpp"
    with pytest.raises(InputError, match=message):
        prepare_kernels(make_config(), World(0, 1, torch.device("cpu")))
    with pytest.raises(InputError, match=message):
        TrainedModel.load(ModelChoice(run=tmp_path, device="cpu"))
    monkeypatch.setenv("KERNELS_BACKEND", "")
    assert choose_backend(None, torch.device("cpu")) == "torch"


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("true", True), ("ON", True), ("0", False), ("", False)])
def test_triton_interprets_by_the_words_that_triton_takes(monkeypatch, value, expected):
    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert interpreted() == expected


def test_an_assembler_that_is_no_program_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(tmp_path / "ptxas"))
    with pytest.raises(InputError, match=r"^TRITON_PTXAS_PATH is '.*ptxas', which is no program; unset it"):
        environment.check_program("TRITON_PTXAS_PATH")
    (tmp_path / "ptxas").touch(mode=0o755)
    environment.check_program("TRITON_PTXAS_PATH")
    monkeypatch.setenv("TRITON_PTXAS_PATH", "")
    environment.check_program("TRITON_PTXAS_PATH")
    monkeypatch.setattr(assembler, "_release_of", {"ptxas": "12.9"}.get)
    assembler.use_right_assembler.cache_clear()
    assert assembler.use_right_assembler() == "12.9"
    assembler.use_right_assembler.cache_clear()


@pytest.mark.parametrize(
    ("settings", "arguments", "said"),
    [
        (TrainConfig, [], "missing --train_path, --valid_path, --config_file, --tokenizer_path (see --help)"),
        (TrainConfig, ["--valid_path=x", "--config_file=x"], "missing --train_path, --tokenizer_path (see --help)"),
        (ExportConfig, [], "missing RUN, OUTPUT (see --help)"),
        (ExportConfig, ["x"], "missing OUTPUT (see --help)"),
    ],
)
def test_only_what_is_required_is_called_missing(capfd, settings, arguments, said):
    with pytest.raises(SystemExit) as end:
        run_command(settings, export, arguments)
    assert end.value.code == 2
    assert capfd.readouterr().err == f"error: {said}\n"
