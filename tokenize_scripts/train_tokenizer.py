"""Train a byte-level BPE tokenizer: `train_tokenizer.py --input corpus --output tokenizer.json --vocab_size=16384`."""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm

from gptbert.command_line import run_command
from gptbert.errors import InputError
from gptbert.io.outputs import check_outputs, staged_outputs
from gptbert.text.corpus import Corpus, CorpusConfig
from gptbert.text.encoding import encode_documents
from gptbert.text.special_tokens import BOS_ID, SPECIAL_TOKENS, UNK_ID
from gptbert.text.tally import TokenFigures, close

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())  # 256 characters, one per byte
LONG_WORD = re.compile(r"\S{1000}")  # what the library learns of a word takes the square of its length: it gets an end
SAMPLED_CHARACTERS = 1_000_000  # of the corpus, encoded at the end to show what the tokenizer does with it
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + len(ALPHABET)


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerConfig(CorpusConfig):
    """Train a byte-level BPE tokenizer: any text can be encoded, and decoding restores every byte."""

    output: Path
    """The tokenizer, a JSON file of the `tokenizers` library."""
    vocab_size: int = 16384
    """Tokens in the vocabulary, including the 16 special ones and the 256 bytes; a small corpus may give fewer."""
    min_frequency: int = 2
    """How often a pair must occur in the corpus to become a token."""


def train_tokenizer(config: TrainTokenizerConfig) -> None:
    """Count the words of the corpus, learn the merges, write the tokenizer.

    Memory grows with the number of distinct words, not with the size of the corpus.

    Raises:
        InputError: a flag, the input or the output cannot be used.
    """
    if config.vocab_size < SMALLEST_VOCABULARY:
        raise InputError(
            f"--vocab_size={config.vocab_size}: must be at least {SMALLEST_VOCABULARY} "
            f"({len(SPECIAL_TOKENS)} special tokens and {len(ALPHABET)} bytes)"
        )
    if config.min_frequency < 1:
        raise InputError(f"--min_frequency={config.min_frequency}: must be at least 1")
    corpus = Corpus(config)
    check_outputs([config.output], corpus.files)
    sample: list[str] = []
    with staged_outputs(config.output) as (staged,):
        tokenizer = learn(_announce_merges(corpus, sample), config.vocab_size, config.min_frequency)
        corpus.require_documents()
        staged.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    size = tokenizer.get_vocab_size()
    if size < config.vocab_size:
        print(
            f"note: the vocabulary has {size} tokens, not {config.vocab_size}: the corpus is too small, it has no more "
            f"pairs that occur {config.min_frequency} times; training works with it as it is, or use more text"
        )
    token_figures = TokenFigures(*_encoded(tokenizer, sample), size)
    close(
        f"wrote {config.output}: {size} tokens, learned from {corpus.counts()}",
        [f"{token_figures.bytes_per_token:.2f} bytes per token at its start", corpus.tally.figures()],
        corpus.tally.warnings() + token_figures.warnings(),
    )


def learn(texts: Iterator[str], vocab_size: int, min_frequency: int) -> Tokenizer:
    """Learn a tokenizer whose special tokens have the ids 0 … 15 and whose encodings start with `<s>`.

    Args:
        texts: documents.
        vocab_size: maximum number of tokens; fewer if no remaining pair is frequent enough.
        min_frequency: occurrences that a pair needs to become a token.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL_TOKENS[UNK_ID]))
    # No normalizer, since it would change the text irreversibly. The byte-level splitter never puts letters and `<` or
    # `>` into one word, so no sequence of merges can spell a special token.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=ALPHABET,
        show_progress=False,  # the corpus has its own
    )
    tokenizer.train_from_iterator(texts, trainer)
    start = SPECIAL_TOKENS[BOS_ID]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A", pair=f"{start} $A {start} $B", special_tokens=[(start, BOS_ID)]
    )
    return tokenizer


def _announce_merges(corpus: Corpus, sample: list[str]) -> Iterator[str]:
    """The documents, the first of them kept in `sample`; then print a line: the library learns without progress."""
    size = 0
    for text in corpus:
        if size < SAMPLED_CHARACTERS:
            sample.append(text)
            size += len(text)
        yield LONG_WORD.sub(lambda word: f"{word[0]}\n", text)
    tqdm.write(f"read {corpus.num_documents:,} documents; learning the merges", file=sys.stderr)


def _encoded(tokenizer: Tokenizer, texts: list[str]) -> tuple[int, int, int]:
    """The numbers of tokens and of unknown ones, and of bytes, of some texts."""
    tokens = unknown = 0
    for ids, *_ in encode_documents(tokenizer, texts):
        tokens += len(ids)
        unknown += int((ids == UNK_ID).sum())
    return tokens, unknown, sum(len(text.encode()) for text in texts)


def main() -> None:
    """Entry point."""
    run_command(TrainTokenizerConfig, train_tokenizer)


if __name__ == "__main__":
    main()
