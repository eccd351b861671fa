"""A run's input files, opened and checked against each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gptbert.config import ModelConfig, TrainConfig
from gptbert.data.token_store import TokenStore
from gptbert.errors import InputError, prefix_errors
from gptbert.text.tokenizer import load_tokenizer, tokenizer_hash

CHECKED_TOKENS = 10**9  # per rank, before the first step


@dataclass(frozen=True)
class Inputs:
    """A run's inputs.

    Attributes:
        model_config: the model's shape.
        vocab_size: of the tokenizer; at most the model's.
        train_stores: training documents, one store per corpus.
        valid_store: validation documents.
    """

    model_config: ModelConfig
    vocab_size: int
    train_stores: tuple[TokenStore, ...]
    valid_store: TokenStore

    @property
    def num_train_tokens(self) -> int:
        """Training tokens over all corpora."""
        return sum(store.num_tokens for store in self.train_stores)

    @classmethod
    def open(cls, config: TrainConfig) -> "Inputs":
        """Open the files that the command line names.

        Raises:
            InputError: a file is missing or damaged, or files do not match.
        """
        with prefix_errors("--config_file"):
            model_config = ModelConfig.from_json(config.config_file)
        with prefix_errors("--tokenizer_path"):
            vocab_size = load_tokenizer(config.tokenizer_path).get_vocab_size()
        if vocab_size > model_config.vocab_size:
            raise InputError(
                f"--tokenizer_path {config.tokenizer_path} has {vocab_size} tokens, more than vocab_size "
                f"{model_config.vocab_size} in --config_file {config.config_file}"
            )
        if config.n_special_tokens >= vocab_size:
            raise InputError(f"--n_special_tokens {config.n_special_tokens} leaves no ordinary token of {vocab_size}")
        digest = tokenizer_hash(config.tokenizer_path)
        longest_row = config.seq_length * (4 if config.seq_length_growth else 1)
        return cls(
            model_config,
            vocab_size,
            tuple(
                _open_store("--train_path", path, config, model_config, digest, longest_row)
                for path in config.train_path
            ),
            _open_store("--valid_path", config.valid_path, config, model_config, digest, config.seq_length),
        )

    def check_ids(self, rank: int, world_size: int) -> None:
        """Read the token files once, split over the ranks; of the training tokens at most a second or two's worth.

        Training tokens beyond world_size · `CHECKED_TOKENS` are checked later, when they are read into rows
        (`TokenStore.gather`).

        Raises:
            InputError: an id is outside its file's vocabulary.
        """
        with prefix_errors("--train_path"):
            for store in self.train_stores:
                store.check_ids(rank, world_size, CHECKED_TOKENS * store.num_tokens // self.num_train_tokens)
        with prefix_errors("--valid_path"):
            self.valid_store.check_ids(rank, world_size)


def corpus_names(paths: Sequence[Path]) -> list[str]:
    """Names of files in messages: their stems, or as many trailing path components as make them unique."""
    names, parts = [path.stem for path in paths], 0
    while len(set(names)) < len(names):
        parts += 1
        names = ["/".join(path.parts[-parts:]) for path in paths]
    return names


def _open_store(
    flag: str, path: Path, config: TrainConfig, model_config: ModelConfig, digest: str, row_length: int
) -> TokenStore:
    with prefix_errors(flag):
        store = TokenStore.open(path)
    if store.tokenizer_hash not in {None, digest}:
        raise InputError(
            f"{flag} {path} was written with another tokenizer than --tokenizer_path {config.tokenizer_path}; "
            "tokenize the corpus again or name its tokenizer"
        )
    if store.vocab_size > model_config.vocab_size:
        raise InputError(
            f"{flag} {path} has token ids up to {store.vocab_size - 1}, beyond vocab_size {model_config.vocab_size} "
            f"in --config_file {config.config_file}"
        )
    if store.num_tokens < row_length:
        raise InputError(
            f"{flag} {path} holds {store.num_tokens} tokens, fewer than one row of {row_length} "
            "(--seq_length, four times that with --seq_length_growth); give more text or shorter rows"
        )
    return store
