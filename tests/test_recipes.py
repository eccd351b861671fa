"""Recipes of whole runs: shell that bash reads, flags that the commands know, and a Slurm job that goes on later.

Slurm's own commands are stand-ins here: `srun` starts its command on this machine, `scontrol` notes what it was asked.
tests/test_hosts.py follows the recipe for several hosts on two of them.
"""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from gptbert.checkpoint import list_checkpoints
from gptbert.command_line import parse
from gptbert.config import TrainConfig
from gptbert.records import read_records
from tests.runs import ROOT, assert_same_end, flags, process_ids, train, wait_for_record, write_inputs

FOLDER = ROOT / "configs" / "runs"
STAND_INS = {
    "srun": 'while [[ $1 == --* ]]; do shift; done\nexec "$@"',
    "scontrol": 'echo "$@" >> "$(dirname "$0")/scontrol.log"',
}
SLURM = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_CPUS_PER_TASK": "2"}
needs_ip = pytest.mark.skipif(shutil.which("ip") is None, reason="the recipes need `ip` (iproute2)")


def add_command(folder, name, script):
    file = folder / name
    file.write_text(f"#!/usr/bin/env bash\n{script}\n")
    file.chmod(0o755)


@pytest.fixture
def commands(tmp_path):
    """Folder of the stand-ins."""
    for name, script in STAND_INS.items():
        add_command(tmp_path, name, script)
    return tmp_path


def environment(commands, **more):
    path = f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | SLURM | {"PATH": path, "OMP_NUM_THREADS": "1"} | more


def test_there_are_recipes_and_bash_reads_them():
    recipes = sorted(FOLDER.iterdir())
    assert [recipe.name for recipe in recipes] == ["hosts.sh", "slurm.sh"]
    for recipe in recipes:
        assert os.access(recipe, os.X_OK)
        done = subprocess.run(["bash", "-n", recipe], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


@needs_ip
@pytest.mark.parametrize("command", [["hosts.sh", "127.0.0.1"], ["slurm.sh"]], ids=lambda command: command[0])
def test_every_flag_is_known(commands, command):
    add_command(commands, "torchrun", 'printf "%s\\n" "$@"')
    done = subprocess.run(
        [FOLDER / command[0], *command[1:], "--name=another", "--seed=1"],
        cwd=ROOT, env=environment(commands), capture_output=True, text=True, check=True,
    )  # fmt: skip
    launch = get_args_parser().parse_args(done.stdout.splitlines())
    assert launch.training_script == "train_distributed.py"
    assert launch.rdzv_endpoint.split(":")[0] == launch.local_addr
    assert launch.rdzv_conf == "is_host=1"
    assert "SIGUSR1" in launch.signals_to_handle.split(",")
    config = parse(TrainConfig, launch.training_script_args)
    assert config.resume == "auto"
    assert (config.name, config.seed) == ("another", 1), "the user's flags replace the recipe's"


def test_the_first_host_must_be_named(commands):
    done = subprocess.run([FOLDER / "hosts.sh"], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stderr.strip().endswith("the address of the first host, as the other hosts reach it")


@needs_ip
def test_a_slurm_job_near_its_limit_is_requeued_and_goes_on(commands):
    inputs = write_inputs(commands)
    settings = {"hybrid_mode": "batch", "mixed_precision": True, "max_steps": 40, "save_every": 5}
    train(inputs, "whole", 2, **settings)

    def submit():
        return subprocess.Popen(
            [FOLDER / "slurm.sh", *flags(inputs, name="slurm", **settings)],
            cwd=ROOT, env=environment(commands, ADDRESS="127.0.0.1", NPROC_PER_NODE="2"),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    run = inputs / "runs" / "slurm"
    job = submit()
    wait_for_record(job, run, 12)
    job.send_signal(signal.SIGUSR1)  # to the script alone, as Slurm does with --signal=B:
    output, _ = job.communicate(timeout=120)
    assert job.returncode != 0, output
    assert read_records(run / "metrics.jsonl")[-1]["step"] < 40, "signalled too late to show anything"
    last = list_checkpoints(run)[-1]
    assert last.name == f"step_{read_records(run / 'metrics.jsonl')[-1]['step']:08d}", "saved when the signal came"
    assert not process_ids("slurm")
    assert (commands / "scontrol.log").read_text() == "requeue 7\n"

    job = submit()
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 0, output
    assert "going on from" in output
    assert (commands / "scontrol.log").read_text() == "requeue 7\n", "a run at its end is not requeued"
    assert_same_end(run, inputs / "runs" / "whole")
