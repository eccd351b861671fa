"""A run's input files, opened and checked against each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from gptbert.config import ModelConfig, TrainConfig, shape_file
from gptbert.data.token_store import TokenStore
from gptbert.errors import InputError, prefix_errors
from gptbert.io.json_file import read_object
from gptbert.schedules import sequence_length
from gptbert.text.special_tokens import SPECIAL_TOKENS, UNK_ID
from gptbert.text.tokenizer import load_tokenizer, special_ids, tokenizer_hash, unknown_id

CHECKED_TOKENS = 10**9  # per rank, before the first step
USUAL_SPECIAL_IDS = tuple(range(len(SPECIAL_TOKENS)))


@dataclass(frozen=True)
class Inputs:
    """A run's inputs.

    Attributes:
        model_config: the model's shape.
        vocab_size: of the tokenizer; at most the model's.
        train_stores: training documents, one store per corpus.
        valid_store: validation documents.
        special_ids: the tokenizer's special tokens, ascending.
        unknown_id: of the token that it gives for unknown text, or None.
        remark: what to tell the user about the vocabulary and long rows; empty if there is nothing special about them.
        tokenizer_hash: recognizes the tokenizer.
    """

    model_config: ModelConfig
    vocab_size: int
    train_stores: tuple[TokenStore, ...]
    valid_store: TokenStore
    special_ids: tuple[int, ...] = USUAL_SPECIAL_IDS
    unknown_id: int | None = UNK_ID
    remark: str = ""
    tokenizer_hash: str = ""

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
        with prefix_errors("--tokenizer_path"):
            tokenizer = load_tokenizer(config.tokenizer_path)
        vocab_size, special = tokenizer.get_vocab_size(), special_ids(tokenizer)
        with prefix_errors("--config_file"):
            model_config = ModelConfig.from_json(config.config_file, vocab_size)
        if config.n_special_tokens not in {None, len(special)}:
            raise InputError(
                f"--n_special_tokens {config.n_special_tokens}, but --tokenizer_path {config.tokenizer_path} has "
                f"{len(special)} special tokens ({_in_words(tokenizer, special)}); without the flag they are those"
            )
        if len(special) == vocab_size:
            raise InputError(f"--tokenizer_path {config.tokenizer_path}: has no token beside {vocab_size} special ones")
        digest = tokenizer_hash(config.tokenizer_path)
        longest = longest_row(config)
        return cls(
            model_config,
            vocab_size,
            tuple(_open_store("--train_path", path, config, vocab_size, digest, longest) for path in config.train_path),
            _open_store("--valid_path", config.valid_path, config, vocab_size, digest, config.seq_length),
            special,
            unknown_id(tokenizer),
            _remark(config, tokenizer, model_config),
            digest,
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


def longest_row(config: TrainConfig) -> int:
    """Tokens of the longest rows of a run, which are the last ones."""
    return sequence_length(config, config.max_steps)


def corpus_names(paths: Sequence[Path]) -> list[str]:
    """Names of files in messages: their stems, or as many trailing path components as make them unique."""
    names, parts = [path.stem for path in paths], 0
    while len(set(names)) < len(names):
        parts += 1
        names = ["/".join(path.parts[-parts:]) for path in paths]
    return names


def _remark(config: TrainConfig, tokenizer: Tokenizer, model_config: ModelConfig) -> str:
    """What is unusual about the special tokens, and where tokenizer, model, its JSON and rows differ in size."""
    size, special, remarks = tokenizer.get_vocab_size(), special_ids(tokenizer), []
    if special != USUAL_SPECIAL_IDS:
        remarks.append(f"{len(special)} special tokens of {size}: {_in_words(tokenizer, special)}")
    stated = read_object(shape_file(config.config_file)).get("vocab_size")
    if stated != model_config.vocab_size:
        other = f"not {stated} as" if stated else "which is not"
        remarks.append(f"vocab_size is {size}, as in --tokenizer_path, {other} in --config_file")
    elif stated > size:
        remarks.append(f"vocab_size is {stated}, as in --config_file; the tokenizer has {size}")
    longest, positions = longest_row(config), model_config.max_position_embeddings
    if longest > positions:
        remarks.append(
            f"rows of {longest} tokens are longer than max_position_embeddings {positions} of --config_file, from "
            "which on the model takes all distances for one"
        )
    return "; ".join(remarks)


def _in_words(tokenizer: Tokenizer, token_ids: tuple[int, ...]) -> str:
    """The tokens of ascending ids, the middle ones left out if there are many."""
    names = [tokenizer.id_to_token(number) or str(number) for number in token_ids]
    return ", ".join(names if len(names) <= 8 else [*names[:6], "…", names[-1]])


def _open_store(
    flag: str, path: Path, config: TrainConfig, vocab_size: int, digest: str, row_length: int
) -> TokenStore:
    with prefix_errors(flag):
        store = TokenStore.open(path)
    if store.tokenizer_hash not in {None, digest}:
        raise InputError(
            f"{flag} {path} was written with another tokenizer than --tokenizer_path {config.tokenizer_path}; "
            "tokenize the corpus again or name its tokenizer"
        )
    if store.vocab_size > vocab_size:
        raise InputError(
            f"{flag} {path} has token ids up to {store.vocab_size - 1}, beyond vocab_size {vocab_size} of "
            f"--tokenizer_path {config.tokenizer_path}; name the tokenizer that it was written with"
        )
    if store.num_tokens < row_length:
        raise InputError(
            f"{flag} {path} holds {store.num_tokens} tokens, fewer than one row of {row_length} "
            "(--seq_length, four times that with --seq_length_growth); give more text or shorter rows"
        )
    return store
