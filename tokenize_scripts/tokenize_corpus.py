"""Tokenize a corpus: `tokenize_corpus.py --input corpus --tokenizer_path tokenizer.json --output train.safetensors`."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from tokenizers import Encoding, Tokenizer

from gptbert.command_line import run_command
from gptbert.corpus import Corpus, CorpusConfig
from gptbert.errors import InputError
from gptbert.token_store import SHARD_TOKENS, TokenStoreWriter
from gptbert.tokenizer import load_tokenizer, tokenizer_hash
from tokenize_scripts.outputs import check_outputs

BATCH_CHARACTERS = 2_000_000  # what one call of the library encodes; it takes some 100 bytes for each resulting token
DOCUMENT_OVERHEAD = 500  # a short document still costs an object of about as much memory as so many characters
ENCODER_THREADS = 2  # the second keeps the cores busy while the first one's results become Python objects
WAITING_BATCHES = ENCODER_THREADS + 1  # being encoded, or encoded and waiting for this thread


@dataclass(frozen=True, kw_only=True)
class TokenizeConfig(CorpusConfig):
    """Turn documents into a file of token ids that training memory-maps."""

    tokenizer_path: Path
    """The tokenizer, a JSON file from train_tokenizer.py."""
    output: Path
    """The token file.
    If it needs shards they are named after it (train-00001-of-00003.safetensors).
    Training takes the name given here either way."""
    shard_tokens: int = SHARD_TOKENS
    """The most tokens in a file, which is held in memory; a document that is longer gets a file of its own."""


def tokenize_corpus(config: TokenizeConfig) -> None:
    """Encode every document and write the token store.

    Raises:
        InputError: a flag, the input or the output cannot be used.
    """
    if config.shard_tokens < 1:
        raise InputError(f"--shard_tokens={config.shard_tokens}: must be at least 1")
    tokenizer = load_tokenizer(config.tokenizer_path)
    corpus = Corpus(config)
    check_outputs([config.output], [*corpus.files, config.tokenizer_path])
    digest = tokenizer_hash(config.tokenizer_path)
    with TokenStoreWriter(config.output, tokenizer.get_vocab_size(), digest, config.shard_tokens) as writer:
        for tokens, lengths in encode_documents(tokenizer, corpus):
            writer.append(tokens, lengths)
        corpus.require_documents()
    names = str(writer.files[0]) if len(writer.files) == 1 else f"{writer.files[0]} to {writer.files[-1].name}"
    print(
        f"wrote {writer.num_tokens:,} tokens ({corpus.text_bytes / writer.num_tokens:.2f} bytes per token) from "
        f"{corpus.counts()} to {len(writer.files)} file{'s'[: len(writer.files) > 1]}: {names}"
    )


def encode_documents(tokenizer: Tokenizer, documents: Iterable[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Encode documents as plain text: without `<s>`, and a literal "<mask>" in them is seven characters, not a mask.

    Two threads keep the library busy on all cores (it lets go of the interpreter lock); meanwhile this one reads the
    next batch and turns the oldest one into arrays.

    Args:
        tokenizer: its settings for padding, truncation and special tokens are changed.
        documents: texts, of any length.

    Yields:
        For each batch of documents the ids [Σ lengths] uint32, end to end, and the lengths [num_documents] int64.
    """
    tokenizer.encode_special_tokens = True
    tokenizer.no_padding()
    tokenizer.no_truncation()
    waiting: deque[Future[list[Encoding]]] = deque()
    encoder = ThreadPoolExecutor(ENCODER_THREADS)
    try:
        for batch in _batches(documents):
            waiting.append(encoder.submit(tokenizer.encode_batch_fast, batch, add_special_tokens=False))
            if len(waiting) > WAITING_BATCHES:
                yield _to_arrays(waiting.popleft().result())
        while waiting:
            yield _to_arrays(waiting.popleft().result())
    finally:
        encoder.shutdown(cancel_futures=True)


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document) + DOCUMENT_OVERHEAD
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _to_arrays(encodings: list[Encoding]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.fromiter(map(len, encodings), np.int64, count=len(encodings))
    ids = chain.from_iterable(encoding.ids for encoding in encodings)
    return np.fromiter(ids, np.uint32, count=int(lengths.sum())), lengths


def main() -> None:
    """Entry point."""
    run_command(TokenizeConfig, tokenize_corpus)


if __name__ == "__main__":
    main()
