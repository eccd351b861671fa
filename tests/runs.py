"""Helpers for tests of whole training runs: small inputs on disk, and runs launched as a user launches them."""

import contextlib
import json
import multiprocessing
import multiprocessing.connection
import os
import queue
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from safetensors.torch import load_file

from gptbert import evaluate
from gptbert.checkpoint.folder import list_checkpoints
from gptbert.monitoring import flops
from gptbert.monitoring.records import read_records
from gptbert.training import preparation
from tests.lanes import DEVICE
from tokenize_scripts.tokenize_corpus import TokenizeConfig, tokenize_corpus
from tokenize_scripts.train_tokenizer import TrainTokenizerConfig, train_tokenizer

ROOT = Path(__file__).parents[1]
SPEED = {"train/tokens_per_second", "train/mfu", "train/waiting_share", "train/peak_memory_gb"}
MODEL = {
    "attention_probs_dropout_prob": 0.1,
    "hidden_dropout_prob": 0.1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "position_bucket_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 320,
    "layer_norm_eps": 1e-5,
}

TAKE_BF16 = "TAKE_BF16"  # in the environment of processes from `forked_ranks`: see `take_bf16`
_CONTEXT = multiprocessing.get_context("forkserver" if DEVICE == "cpu" else "spawn")  # CUDA does not survive a fork
_CONTEXT.set_forkserver_preload(["tests.preloaded"])
flops._QUICK_SIZES["cpu"] = (64,)  # a run measures the CPU with products of 1024: a tenth of the time of a short one


def write_inputs(folder: Path, train_characters: int = 60_000) -> Path:
    """Write a tokenizer, token files, `model.json` and `no_dropout.json`, built from Python's own documentation."""
    texts = [topics[name] for name in sorted(topics)]
    documents, size = [], 0
    while size < train_characters:
        documents.append(texts[len(documents)][:4000])
        size += len(documents[-1])
    (folder / "train.jsonl").write_text("".join(json.dumps(text) + "\n" for text in documents))
    (folder / "valid.jsonl").write_text("".join(json.dumps(text[:2000]) + "\n" for text in texts[-4:]))
    train_tokenizer(
        TrainTokenizerConfig(
            input=(folder / "train.jsonl",), output=folder / "tokenizer.json", vocab_size=MODEL["vocab_size"]
        )
    )
    for name in ("train", "valid"):
        tokenize_corpus(
            TokenizeConfig(
                input=(folder / f"{name}.jsonl",),
                tokenizer_path=folder / "tokenizer.json",
                output=folder / f"{name}.safetensors",
            )
        )
    (folder / "model.json").write_text(json.dumps(MODEL))
    no_dropout = MODEL | {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
    (folder / "no_dropout.json").write_text(json.dumps(no_dropout))
    return folder


def flags(inputs: Path, **changes: object) -> list[str]:
    """Command line of a short run; `changes` are extra flags: True for one without value, a list for several values."""
    settings = {
        "train_path": inputs / "train.safetensors",
        "valid_path": inputs / "valid.safetensors",
        "config_file": inputs / "model.json",
        "tokenizer_path": inputs / "tokenizer.json",
        "output_dir": inputs / "runs",
        "seq_length": 32,
        "local_batch_size": 8,
        "global_batch_size": 16,
        "batch_reduction": 2,
        "learning_rate": 1e-2,
        "warmup_proportion": 0.1,
        "max_steps": 20,
        "validate_every": 10,
        "validation_steps": 2,
        "save_every": 0,
        "log_every": 1,
        "device": "cpu",
        "cpu_threads": 1,  # OpenMP threads busy-wait, which takes minutes if other tests use the same cores
        "wandb_mode": "disabled",
    } | changes
    arguments = []
    for name, value in settings.items():
        if isinstance(value, list):
            arguments += [f"--{name}", *map(str, value)]
        elif value is not False:
            arguments.append(f"--{name}" if value is True else f"--{name}={value}")
    return arguments


def start(arguments: list[str], world_size: int = 1, *torchrun: str, **variables: str) -> subprocess.Popen:
    """Launch train_distributed.py in its own session, under torchrun if there is more than one process.

    Args:
        arguments: command line from `flags`.
        world_size: number of processes.
        torchrun: extra flags for torchrun.
        variables: extra environment variables.
    """
    launcher = [sys.executable]
    if world_size > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}", *torchrun]
    environment = {name: value for name, value in os.environ.items() if name not in {"RANK", "WORLD_SIZE"}} | variables
    return subprocess.Popen(
        [*launcher, "train_distributed.py", *arguments],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_record(process: "subprocess.Popen[str] | Ranks", run_dir: Path, number: int) -> None:
    """Wait until the run has written its `number`-th record."""
    deadline = time.monotonic() + 300
    while len(read_records(run_dir / "metrics.jsonl")) < number:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def process_ids(name: str) -> list[int]:
    """Ids of a run's processes, including torchrun's; found by command line, since workers have their own sessions."""
    found = []
    for command_line in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # the process has ended
            if f"--name={name}\0".encode() in command_line.read_bytes():
                found.append(int(command_line.parent.name))
    return found


def workers(name: str) -> dict[int, int]:
    """Ids of a run's training processes by local rank."""
    found = {}
    for process_id in process_ids(name):
        folder = Path(f"/proc/{process_id}")
        with contextlib.suppress(OSError):  # the process has ended
            if b"torch.distributed.run" not in (folder / "cmdline").read_bytes().split(b"\0"):
                lines = (folder / "environ").read_bytes().split(b"\0")
                found[int(dict(line.partition(b"=")[::2] for line in lines).get(b"LOCAL_RANK", 0))] = process_id
    return found


def kill(process: subprocess.Popen, name: str) -> None:
    """Kill all remaining processes of a run at once."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for process_id in process_ids(name):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process_id, signal.SIGKILL)
    process.wait()


class Ranks:
    """The processes of a run, from `forked_ranks`, which a test can disturb.

    Args:
        arguments: command line from `flags`.
        world_size: number of processes.
        log: file for what all of them print; replaced.
        prepare: called in each process before the run, with its rank.
    """

    def __init__(
        self, arguments: list[str], world_size: int, log: Path, prepare: Callable[[int], None] | None = None
    ) -> None:
        log.unlink(missing_ok=True)
        self.log = log
        self.processes = forked_ranks(world_size, _train, arguments, log, prepare)

    def poll(self) -> int | None:
        """The status of the first process that failed, or else 0 if all have ended and None if some have not."""
        codes = [process.exitcode for process in self.processes]
        return next((code for code in codes if code), None if None in codes else 0)

    def send_signal(self, number: int) -> None:
        """Send a signal to every process."""
        for process in self.processes:
            os.kill(process.pid, number)

    def kill(self) -> None:
        """Kill all remaining processes at once."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def communicate(self) -> tuple[str, int]:
        """Wait until all have ended, or one has failed, for which the others may wait; returns output and status."""
        deadline = time.monotonic() + 300
        while running := [process.sentinel for process in self.processes if process.is_alive()]:
            if self.poll() is not None or time.monotonic() > deadline:
                break
            multiprocessing.connection.wait(running, timeout=deadline - time.monotonic())
        status = self.poll()
        self.kill()
        return self.log.read_text(), status


def train(inputs: Path, name: str, world_size: int = 1, **changes: object) -> list[dict]:
    """Run training to the end in processes from `forked_ranks`; returns the records of metrics.jsonl."""
    ranks = Ranks(flags(inputs, name=name, **changes), world_size, inputs / f"{name}.log")
    output, status = ranks.communicate()
    assert status == 0, output
    return read_records(inputs / "runs" / name / "metrics.jsonl")


def _train(arguments: list[str], log: Path, prepare: Callable[[int], None] | None) -> None:
    with log.open("a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.chdir(ROOT)
    if prepare:
        prepare(int(os.environ.get("RANK", "0")))
    sys.argv = ["train_distributed.py", *arguments]
    runpy.run_path("train_distributed.py", run_name="__main__")


def assert_same_end(run_dir: Path, other: Path) -> None:
    """Two runs have the same records except for speed, the same samples and the same newest checkpoint, bit for bit."""
    records = [read_records(path / "metrics.jsonl") for path in (run_dir, other)]
    without_speed = [[{key: record[key] for key in record if key not in SPEED} for record in each] for each in records]
    assert without_speed[0] == without_speed[1]
    samples = [read_records(path / "samples.jsonl") for path in (run_dir, other)]
    assert samples[0] == samples[1] != []
    assert_same_checkpoint(*(list_checkpoints(path)[-1] for path in (run_dir, other)))
    for path in (run_dir, other):
        assert not list((path / "checkpoints").glob(".*")), "nothing half-written is left"


def assert_same_checkpoint(path: Path, other: Path) -> None:
    """Two checkpoints have the same step and bitwise equal content."""
    assert path.name == other.name
    files = [sorted(file.relative_to(folder) for file in folder.rglob("*")) for folder in (path, other)]
    assert files[0] == files[1]
    tensors = [file for file in files[0] if file.suffix == ".safetensors"]
    assert len(tensors) > 1
    for file in tensors:  # compare tensors: shard headers list metadata in any order
        assert_same(load_file(path / file), load_file(other / file), str(file))
    assert_same(*(torch.load(folder / "training_state.pt", weights_only=True) for folder in (path, other)))


def assert_same(one: object, other: object, path: str = "") -> None:
    """Bitwise equal, recursing into dictionaries, lists and tensors."""
    assert type(one) is type(other), path
    if isinstance(one, dict):
        assert one.keys() == other.keys(), path
        for key in one:
            assert_same(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), path
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_same(left, right, f"{path}/{index}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    else:
        assert one == other, path


def losses(records: list[dict]) -> list[float]:
    """Training losses, then validation losses, each in step order."""
    keys = ("train/loss", "train/mlm/loss", "train/clm/loss", "validation/mlm/loss", "validation/clm/loss")
    return [record[key] for key in keys for record in records if key in record]


def on_ranks(world_size: int, target: Callable[..., None], *arguments: object) -> dict[int, Any]:
    """Run `target(rank, *arguments, results)` on every rank; returns each rank's result by rank.

    Each process has torchrun's environment and puts (rank, result) into `results`.
    """
    results = _CONTEXT.Queue()
    ranks = forked_ranks(world_size, _with_rank, target, *arguments, results)
    said: dict[int, Any] = {}
    for _ in range(300):
        ended = [process.exitcode is not None for process in ranks]
        with contextlib.suppress(queue.Empty):
            while len(said) < len(ranks):
                said.update([results.get(timeout=1)])
        # one that crashes once it has said its result, as gloo's threads may at the end, is no failure
        if len(said) == len(ranks) or any(ended[rank] and rank not in said for rank in range(world_size)):
            break
    for process in ranks:
        process.join(60 if len(said) == len(ranks) else 0)
        process.kill()
    assert len(said) == len(ranks), "see what the ranks wrote"
    return said


def _with_rank(target: Callable[..., None], *arguments: object) -> None:
    target(int(os.environ["RANK"]), *arguments)


def forked_ranks(world_size: int, target: Callable[..., None], *arguments: object) -> list[BaseProcess]:
    """Start processes that run `target(*arguments)`, with torchrun's environment if there are several.

    They are forked from a process that has imported everything, which saves seconds per process compared with `start`.
    """
    variables = dict(os.environ) | {"OMP_NUM_THREADS": "1"}
    if world_size > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(world_size))
        variables |= {**sizes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = []
    for rank in map(str, range(world_size)):
        own = variables | ({"RANK": rank, "LOCAL_RANK": rank} if world_size > 1 else {})
        ranks.append(_CONTEXT.Process(target=_run_as, args=(own, target, *arguments)))
        ranks[-1].start()
    return ranks


def _run_as(variables: dict[str, str], target: Callable[..., None], *arguments: object) -> None:
    os.environ.clear()
    os.environ |= variables
    torch.set_num_threads(1)
    if TAKE_BF16 in variables:
        take_bf16(setattr)
    target(*arguments)


def take_bf16(set_attribute: Callable[[object, str, object], None], is_there: bool = True) -> None:
    """Let runs of this process take the device for one with bf16, or for one without; `set_attribute` as `setattr`."""
    for module in (preparation, evaluate):
        set_attribute(module, "has_bf16", lambda device: is_there)
