"""Tokenize a corpus: `tokenize_corpus.py --input corpus --tokenizer_path tokenizer.json --output train.safetensors`."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gptbert.command_line import run_command
from gptbert.data.token_store import SHARD_TOKENS, TokenStoreWriter
from gptbert.errors import InputError
from gptbert.io.outputs import check_outputs
from gptbert.text.corpus import Corpus, CorpusConfig
from gptbert.text.encoding import LostText, encode_documents
from gptbert.text.tally import TokenFigures, close
from gptbert.text.tokenizer import load_tokenizer, notes, tokenizer_hash, unknown_id


@dataclass(frozen=True, kw_only=True)
class TokenizeConfig(CorpusConfig):
    """Turn documents into a file of token ids that training memory-maps."""

    tokenizer_path: Path
    """The tokenizer, a JSON file from train_tokenizer.py."""
    output: Path
    """The token file.
    If it is split into shards, they are named after it (train-00001-of-00003.safetensors).
    Training takes the name given here either way."""
    shard_tokens: int = SHARD_TOKENS
    """Maximum tokens per file, which is held in memory; a longer document gets its own file."""


def tokenize_corpus(config: TokenizeConfig) -> None:
    """Encode every document and write the token store.

    Raises:
        InputError: a flag, the input or the output cannot be used.
    """
    if config.shard_tokens < 1:
        raise InputError(f"--shard_tokens={config.shard_tokens}: must be at least 1")
    tokenizer = load_tokenizer(config.tokenizer_path)
    for note in notes(config.tokenizer_path, tokenizer):
        print(f"note: tokenizer {config.tokenizer_path} {note}")
    corpus = Corpus(config)
    check_outputs([config.output], [*corpus.files, config.tokenizer_path])
    digest = tokenizer_hash(config.tokenizer_path)
    unknown_token, unknown = unknown_id(tokenizer), 0
    lost = LostText(tokenizer, unknown_token)
    with TokenStoreWriter(config.output, tokenizer.get_vocab_size(), digest, config.shard_tokens) as writer:
        for tokens, lengths, words in encode_documents(tokenizer, lost.watched(corpus)):
            writer.append(tokens, lengths, words)
            unknown += np.count_nonzero(tokens == unknown_token)
        corpus.require_documents()
        size = tokenizer.get_vocab_size()
        token_figures = TokenFigures(writer.num_tokens, unknown, corpus.tally.text_bytes, size, lost.share)
        token_figures.check(config.tokenizer_path)
    files = f"1 file: {writer.files[0]}"
    if len(writer.files) > 1:
        files = f"{len(writer.files)} files: {writer.files[0]} to {writer.files[-1].name}"
    close(
        f"wrote {writer.num_tokens:,} tokens ({token_figures.bytes_per_token:.2f} bytes per token) of "
        f"{writer.num_words:,} words from {corpus.tally.counts()} to {files}",
        [f"{token_figures.unknown_share:.2%} of the tokens are unknown", corpus.tally.figures()],
        corpus.warnings() + token_figures.warnings(),
    )


def main() -> None:
    """Entry point."""
    run_command(TokenizeConfig, tokenize_corpus)


if __name__ == "__main__":
    main()
