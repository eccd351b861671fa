"""Whole training runs for tests: small inputs on disk, launched as a user would launch them."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

from gptbert.metrics import read_records
from tokenize_scripts.tokenize_corpus import TokenizeConfig, tokenize_corpus
from tokenize_scripts.train_tokenizer import TrainTokenizerConfig, train_tokenizer

ROOT = Path(__file__).parents[1]
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


def write_inputs(folder: Path, train_characters: int = 60_000) -> Path:
    """Tokenizer, token files, `model.json` and `no_dropout.json`, from Python's own documentation."""
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
    """The command line of a short run; `changes` are further flags, True for a bare one."""
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
        "cpu_threads": 1,  # OpenMP's threads spin while they wait, which takes minutes where other tests want the cores
        "wandb_mode": "disabled",
    } | changes
    return [
        f"--{name}" if value is True else f"--{name}={value}" for name, value in settings.items() if value is not False
    ]


def start(arguments: list[str], world_size: int = 1) -> subprocess.Popen:
    """Launch train_distributed.py, under torchrun for more than one process, in a session of its own."""
    launcher = [sys.executable]
    if world_size > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
    environment = {name: value for name, value in os.environ.items() if name not in {"RANK", "WORLD_SIZE"}}
    return subprocess.Popen(
        [*launcher, "train_distributed.py", *arguments],
        cwd=ROOT,
        env=environment | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def train(inputs: Path, name: str, world_size: int = 1, **changes: object) -> list[dict]:
    """Run to the end and return the records of metrics.jsonl."""
    process = start(flags(inputs, name=name, **changes), world_size)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return read_records(inputs / "runs" / name / "metrics.jsonl")


def losses(records: list[dict]) -> list[float]:
    """Training losses, then validation losses, in the order of the steps."""
    keys = ("train/loss", "train/mlm/loss", "train/clm/loss", "validation/mlm/loss", "validation/clm/loss")
    return [record[key] for key in keys for record in records if key in record]


def on_two_ranks(target: Callable[..., None], *arguments: object) -> dict[int, str]:
    """What each of two processes says that run `target(rank, port, *arguments, results)`, by rank.

    Each puts its rank and what it has to say into `results`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=target, args=(rank, port, *arguments, results)) for rank in range(2)]
    for process in ranks:
        process.start()
    said = dict(results.get(timeout=120) for _ in ranks)
    for process in ranks:
        process.join(60)
    return said
