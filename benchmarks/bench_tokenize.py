"""Speed of tokenize_corpus.py against a bare `encode_batch` loop: `python -m benchmarks.bench_tokenize [--json]`.

The loop has all texts in memory and discards its result; tokenize_corpus also reads and parses JSONL, converts ids to
arrays and writes the token file. The two alternate in one run, so that other load on the machine affects both.
"""

import contextlib
import io
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from gptbert.command_line import run_command
from gptbert.errors import InputError
from gptbert.text.corpus import Corpus, CorpusConfig
from gptbert.text.tokenizer import load_tokenizer
from tokenize_scripts.demo_corpus import DemoConfig, demo_corpus
from tokenize_scripts.tokenize_corpus import TokenizeConfig, tokenize_corpus
from tokenize_scripts.train_tokenizer import TrainTokenizerConfig, train_tokenizer

LOOP_DOCUMENTS = 1000  # per call of the bare loop, a usual number


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Measure tokenize_corpus.py against a bare encode_batch loop."""

    input: Path | None = None
    """JSONL to tokenize; by default the demo corpus, repeated."""
    vocab_size: int = 16384
    """Tokens in the vocabulary of the tokenizer that is trained on the input first."""
    megabytes: float = 20.0
    """Size of the repeated demo corpus, in 10^6 bytes of text."""
    alternations: int = 7
    """How often each of the two is timed; one more, before these, warms up."""
    json: bool = False
    """Print one JSON object instead of a sentence."""


def measure(config: BenchConfig) -> dict[str, object]:
    """Time both, alternating.

    Returns:
        Medians in 10^6 bytes of text per second, the median ratio of adjacent pairs, and the machine.
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        source, tokenizer_path, output = (
            Path(folder, name) for name in ("in.jsonl", "tokenizer.json", "out.safetensors")
        )
        corpus_file = config.input or _repeated_demo(source, config.megabytes)
        train_tokenizer(TrainTokenizerConfig(input=(corpus_file,), output=tokenizer_path, vocab_size=config.vocab_size))
        corpus = Corpus(CorpusConfig(input=(corpus_file,)))
        texts = list(corpus)
        tokenizer = load_tokenizer(tokenizer_path)
        job = TokenizeConfig(input=(corpus_file,), tokenizer_path=tokenizer_path, output=output)

        def bare_loop() -> None:
            for first in range(0, len(texts), LOOP_DOCUMENTS):
                tokenizer.encode_batch(texts[first : first + LOOP_DOCUMENTS], add_special_tokens=False)

        pairs = [(_seconds(bare_loop), _seconds(lambda: tokenize_corpus(job))) for _ in range(config.alternations + 1)][
            1:
        ]
    megabytes = corpus.tally.text_bytes / 1e6
    return {
        "bare_loop_mb_per_s": round(statistics.median(megabytes / bare for bare, _ in pairs), 2),
        "tokenize_corpus_mb_per_s": round(statistics.median(megabytes / ours for _, ours in pairs), 2),
        "ratio": round(statistics.median(bare / ours for bare, ours in pairs), 3),
        "megabytes": round(megabytes, 1),
        "documents": corpus.tally.num_documents,
        "alternations": config.alternations,
        "cores": os.cpu_count(),
        "machine": platform.processor() or platform.machine(),
        "tokenizers": tokenizers.__version__,
    }


def _repeated_demo(file: Path, megabytes: float) -> Path:
    demo_corpus(DemoConfig(output=file))
    content = file.read_bytes()
    file.write_bytes(content * max(1, round(megabytes * 1e6 / len(content))))
    return file


def _seconds(action: Callable[[], None]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def run(config: BenchConfig) -> None:
    """Measure, and print.

    Raises:
        InputError: there is nothing to tokenize, or nothing to time.
    """
    if config.alternations < 1:
        raise InputError(f"--alternations {config.alternations}: must be at least 1")
    result = measure(config)
    if config.json:
        print(json.dumps(result))
        return
    print(
        "tokenize_corpus {tokenize_corpus_mb_per_s} MB/s, bare encode_batch loop {bare_loop_mb_per_s} MB/s: "
        "ratio {ratio}, medians of {alternations} alternations over {megabytes} MB on {cores} cores".format(**result)
    )


if __name__ == "__main__":
    run_command(BenchConfig, run)
