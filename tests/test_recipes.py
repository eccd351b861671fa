"""Recipes of whole runs: valid bash, flags that the commands accept, and a Slurm job that is requeued and resumes.

Also the warning for a batch size and learning rate far from every recipe.

Slurm's commands are stubs: `srun` starts its command on this machine, `scontrol` records its arguments.
tests/test_hosts.py runs the multi-host recipe on two hosts.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from torch.distributed.run import get_args_parser

from gptbert.checkpoint.folder import list_checkpoints
from gptbert.command_line import parse
from gptbert.config import TrainConfig
from gptbert.monitoring import recipes
from gptbert.monitoring.records import read_records
from gptbert.train import fit
from tests.runs import MODEL, ROOT, assert_same_end, flags, process_ids, train, wait_for_record, write_inputs

FOLDER = ROOT / "configs" / "runs"
STAND_INS = {
    "srun": 'while [[ $1 == --* ]]; do shift; done\nexec "$@"',
    "scontrol": 'echo "$@" >> "$(dirname "$0")/scontrol.log"',
}
SLURM = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_CPUS_PER_TASK": "2"}
WHOLE = ("babylm_10m", "babylm_100m", "four_gpus")  # from documents to a trained model
needs_ip = pytest.mark.skipif(shutil.which("ip") is None, reason="the recipes need `ip` (iproute2)")


def add_command(folder, name, script):
    file = folder / name
    file.write_text(f"#!/usr/bin/env bash\n{script}\n")
    file.chmod(0o755)


@pytest.fixture
def commands(tmp_path):
    """Folder of the stubs."""
    for name, script in STAND_INS.items():
        add_command(tmp_path, name, script)
    return tmp_path


def environment(commands, **more):
    path = f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | SLURM | {"PATH": path, "OMP_NUM_THREADS": "1"} | more


def test_there_are_recipes_and_bash_reads_them():
    files = sorted(FOLDER.iterdir())
    assert [file.name for file in files] == [
        *sorted(f"{name}.sh" for name in WHOLE),
        "hosts.sh",
        "prepare.sh",
        "slurm.sh",
    ]
    for recipe in files:
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
    job.send_signal(signal.SIGUSR1)  # to the script only, as Slurm does with --signal=B:
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


def test_a_second_warning_does_not_requeue_a_job_that_is_saving(commands):
    """The stand-in for srun saves until the test lets it end."""
    save = "touch saving; while [[ ! -e saved ]]; do sleep 0.01; done; echo saved >> scontrol.log; exit 1"
    add_command(commands, "srun", f"cd {commands}\ntrap '{save}' USR1\ntouch started\nwhile :; do sleep 0.01; done")

    def wait_for(name):
        while not (commands / name).exists():
            assert job.poll() is None
            time.sleep(0.01)

    job = subprocess.Popen([FOLDER / "slurm.sh"], cwd=ROOT, env=environment(commands, ADDRESS="127.0.0.1"))
    wait_for("started")
    job.send_signal(signal.SIGUSR1)
    wait_for("saving")
    job.send_signal(signal.SIGUSR1)
    time.sleep(1)  # in which it would requeue the job
    (commands / "saved").touch()
    assert job.wait(60) == 1
    assert (commands / "scontrol.log").read_text() == "saved\nrequeue 7\n"


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """A folder with documents to train and validate on, a small model, and the recipes' output."""
    folder = tmp_path_factory.mktemp("documents")
    texts = [topics[name][:1000] for name in sorted(topics)]  # of so many, some go to validation in every Python
    (folder / "train.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    (folder / "model.json").write_text(json.dumps(MODEL))
    return folder


def run_recipe(name, documents, **variables):
    own = {"DATA": documents / "train.jsonl", "OUT": documents / "out", "CONFIG": documents / "model.json"}
    return subprocess.run(
        [FOLDER / f"{name}.sh", "--seq_length=16", "--global_batch_size=8", "--device=cpu", "--cpu_threads=1",
         "--wandb_mode=disabled", "--save_every=0"],
        cwd=ROOT, env=os.environ | {key: str(value) for key, value in (own | variables).items()},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(("name", "processes"), [("babylm_10m", 2), ("babylm_100m", 1), ("four_gpus", 1)])
def test_a_recipe_is_the_whole_path(commands, documents, name, processes):
    """At toy size; the first recipe prepares the corpus, the others reuse it."""
    shared = environment(commands, GPUS=str(processes), MAX_STEPS="4")
    made = {file: file.stat().st_mtime_ns for file in (documents / "out").glob("*.*")}
    done = run_recipe(name, documents, **shared)
    assert done.returncode == 0, done.stdout
    run = documents / "out" / "runs" / name
    assert list_checkpoints(run)[-1].name == "step_00000004"
    assert {"validation/mlm/loss", "validation/clm/loss"} <= set(read_records(run / "metrics.jsonl")[-1])
    names = {"tokenizer.json", "train.safetensors", "validation.safetensors"}
    assert names == {file.name for file in (documents / "out").glob("*.*")}
    assert all(file.stat().st_mtime_ns == time for file, time in made.items()), "made once"
    if name == "babylm_100m":  # in one process, which starts in less time than two
        assert "finished already" in run_recipe(name, documents, **shared).stdout, "the same command goes on"


def test_a_model_is_named_or_the_recipe_ends_before_the_work(commands, documents):
    """CONFIG=base is --config_file=base; a name that is none ends with a line, and nothing is written."""
    add_command(commands, "python", 'echo "$@" >> "$(dirname "$0")/python.log"')
    out = commands / "named"
    for name, status in (("base", 0), ("bsae", 1)):
        done = subprocess.run(
            [FOLDER / "prepare.sh", documents / "train.jsonl", out, name],
            cwd=ROOT, env=environment(commands), capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == status, done.stderr
        log = (commands / "python.log").read_text()
        assert "configs/base.json" in log
        assert log.count("split_corpus.py") == 1
    assert done.stderr == "error: CONFIG is bsae: no such file, nor configs/bsae.json\n"


def full_size(commands, documents, name):
    """Arguments of torchrun and the trainer for a recipe that is given only its documents."""
    add_command(commands, "torchrun", 'printf "%s\\n" "$@"')
    add_command(commands, "python", 'echo "$@" >> "$(dirname "$0")/python.log"')
    done = subprocess.run(
        [FOLDER / f"{name}.sh"], cwd=ROOT, env=environment(commands, DATA="my corpus.jsonl", OUT=str(commands / "out")),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    launch = get_args_parser().parse_args(done.stdout.splitlines())
    return launch, parse(TrainConfig, launch.training_script_args)


@pytest.mark.parametrize("name", WHOLE)
def test_a_recipe_trains_with_what_it_is_known_for(commands, documents, name):
    launch, config = full_size(commands, documents, name)
    assert launch.nproc_per_node == ("4" if name == "four_gpus" else "auto")
    assert (ROOT / config.config_file).is_file()
    (recipe,) = [recipe for recipe in recipes.RECIPES if recipe.name == f"configs/runs/{name}.sh"]
    own = (config.optimizer, config.global_batch_size, config.seq_length, config.learning_rate)
    assert own == (recipe.optimizer, recipe.rows, recipe.length, recipe.learning_rate)
    assert recipes.warning(config) is None
    assert config.checkpoint_words == ("babylm",)
    assert config.mask_history == name.startswith("babylm"), "as the published code does"
    log = (commands / "python.log").read_text()
    assert "--input my corpus.jsonl" in log, "a name with a space stays one"
    assert ("--like=upstream" in log) == name.startswith("babylm")
    assert re.findall(r"^tokenize_scripts/(\w+)", log, re.MULTILINE) == [
        "split_corpus", "train_tokenizer", "tokenize_corpus", "tokenize_corpus"
    ]  # fmt: skip


@pytest.mark.parametrize("page", ["README.md", "docs/training.md"])
def test_the_four_gpus_are_the_users(commands, documents, make_config, page):
    _, config = full_size(commands, documents, "four_gpus")
    text = (ROOT / page).read_text(encoding="utf-8")
    command = text.split("train_distributed.py \\", 1)[1].split("```", 1)[0]
    shown = parse(TrainConfig, shlex.split(command.replace("\\\n", " ")))
    ours = {
        "train_path",
        "valid_path",
        "config_file",
        "tokenizer_path",
        "output_dir",
        "name",
        "resume",
        "checkpoint_words",
    }
    assert {key for key, value in shown.to_dict().items() if config.to_dict()[key] != value} == ours


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, None),
        ({"learning_rate": 4.1e-3}, "from 0.00025 to below 0.004 would be in range"),
        ({"learning_rate": 1.41e-2}, "the nearest recipe, configs/runs/four_gpus.sh, has 0.001 at 128 x 128"),
        ({"learning_rate": 2.4e-4}, "from 0.00025"),
        # four times the batch is twice the rate, whether rows or tokens grow
        ({"seq_length": 512, "learning_rate": 7.9e-3}, None),
        ({"global_batch_size": 512, "learning_rate": 8.1e-3}, "to below 0.008 would"),
        # a recipe's rate for much smaller batches and for much larger ones
        ({"global_batch_size": 32, "learning_rate": 1e-3}, None),
        ({"global_batch_size": 4, "learning_rate": 1e-3}, "--global_batch_size 4 x --seq_length 128"),
        ({"global_batch_size": 32768, "learning_rate": 1e-3}, "babylm_100m.sh, has 0.01 at 32768 x 128"),
        # known to diverge, so also with noisier gradients; scaled by the square root for more tokens
        ({"global_batch_size": 32768, "learning_rate": 1.99e-2}, None),
        ({"global_batch_size": 32768, "learning_rate": 2e-2}, "the nearest recipe, configs/runs/babylm_10m.sh"),
        ({"global_batch_size": 16384, "learning_rate": 2e-2}, "to below 0.02"),
        ({"global_batch_size": 131072, "learning_rate": 3.9e-2}, None),
        ({"global_batch_size": 131072, "learning_rate": 4.1e-2}, "to below 0.04"),
        # AdamW has its own rates
        ({"optimizer": "adamw"}, None),
        ({"optimizer": "adamw", "global_batch_size": 32768, "learning_rate": 1.41e-2}, "RoBERTa-base, has 0.0006"),
        ({"optimizer": "adamw", "global_batch_size": 256, "seq_length": 512, "learning_rate": 1.1e-3}, "ELECTRA-Base"),
        # Muon uses AdamW's
        ({"optimizer": "muon", "learning_rate": 5e-4}, None),
        ({"optimizer": "muon", "learning_rate": 2e-2}, "--optimizer muon at --global_batch_size 128"),
        # pretrained weights need small rates
        ({"initial_weights": "somewhere", "learning_rate": 1e-5}, None),
        ({"initial_weights": "somewhere", "learning_rate": 5e-3}, "--learning_rate 0.005 is far"),
        # a short trial
        ({"learning_rate": 1.0, "max_steps": 999}, None),
        ({"learning_rate": 1.0, "max_steps": 1000}, "--learning_rate 1 is far from"),
        ({"learning_rate": 0.0}, "--learning_rate 0 is far from"),
    ],
    ids=str,
)  # fmt: skip
def test_a_warning_where_batch_and_rate_together_are_no_recipes(make_config, changes, says):
    line = recipes.warning(make_config(**changes))
    if says is None:
        assert line is None
    else:
        assert says in line
        assert line.startswith("warning: --learning_rate")
        assert "\n" not in line


def test_the_demo_is_a_trial_that_is_not_warned_about(make_config):
    """Its rate is far above the recipes', but works for 500 steps of a model with a million parameters."""
    command = (ROOT / "Makefile").read_text(encoding="utf-8").split("train_distributed.py", 1)[1].split("\n\t$(BIN)")[0]
    config = parse(TrainConfig, shlex.split(command.replace("\\\n", " ")))
    assert config.max_steps == 500
    assert recipes.warning(config) is None


def test_a_run_far_from_the_recipes_warns_once(tmp_path, monkeypatch, capsys):
    inputs = write_inputs(tmp_path)
    monkeypatch.setattr(recipes, "TRIAL_STEPS", 1)
    fit(parse(TrainConfig, flags(inputs, name="far", max_steps=1, validate_every=0)))
    assert capsys.readouterr().err.count("warning: --learning_rate 0.01 is far from") == 1
