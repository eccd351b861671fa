"""`python -m gptbert.evaluate RUN DATA`: loss, perplexity and accuracy of both objectives on token files or texts.

Rows, masks and means are those of a run's validation (`monitoring.validation`): evaluated on its `--valid_path`, a
checkpoint gives the numbers that the run logged for it. Texts are encoded as in tokenize_corpus.py. With
`--domain_field`, every domain has separate rows, and the totals are means over the labels of all domains.
"""

import json
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from tqdm import tqdm

from gptbert.checkpoint.folder import settings_if_any
from gptbert.checkpoint.saved_model import corpora_seen
from gptbert.command_line import run_command
from gptbert.data.progress import corpus_digest
from gptbert.data.token_store import TokenStore, token_dtype
from gptbert.distributed.hardware import has_bf16
from gptbert.distributed.world import World
from gptbert.errors import InputError
from gptbert.io.names import MEASURES, TOKENIZER
from gptbert.io.outputs import check_outputs, staged_outputs
from gptbert.io.screen import table
from gptbert.model.objective import Objective
from gptbert.monitoring.metrics import LossSums
from gptbert.monitoring.validation import DEFAULT_TOKENS, Validation, ValidationSettings
from gptbert.scoring.closing import unknown_line, unknown_share
from gptbert.scoring.trained_model import ModelChoice, TrainedModel
from gptbert.text.corpus import Corpus, CorpusConfig
from gptbert.text.encoding import encode_documents
from gptbert.text.tokenizer import special_ids, tokenizer_hash

_TOKEN_FILES = {".safetensors", ".bin"}  # under other names, by content
_LOOKED_AT = 1000  # documents of each domain, and tokens of each of them, in which unknown ones are counted


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(CorpusConfig, ModelChoice):
    """Evaluate a checkpoint on data: loss in nats, perplexity and accuracy of both objectives."""

    input: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """A token file (safetensors, or upstream's .bin), or files or folders of documents, as for tokenize_corpus.py;
    omit it with --dataset."""
    dataset: str | None = None
    """Instead of DATA: a Hugging Face dataset, streamed; its name on the Hub or a folder of data files."""
    domain_field: str | None = None
    """Field of JSONL objects or column of tables: gives results for each of its values, and for all together."""
    seq_length: int | None = None
    """Tokens per row. Default: the run's."""
    mask_p: float | None = None
    """Fraction of tokens masked. Default: the run's --validation_mask_p."""
    validation_steps: int = 0
    """Evaluate this many of the run's batches per domain, like the run's --validation_steps; 0: all rows."""
    output: Path | None = None
    """JSON file for the results."""

    def __post_init__(self) -> None:
        if not self.input and not self.dataset:
            raise InputError(
                "DATA: needs a token file, or at least one file or folder of documents, or --dataset a name"
            )
        if self.input and self.dataset:
            raise InputError("DATA and --dataset: give one of the two")
        if self.mask_p is not None and not 0 <= self.mask_p <= 1:
            raise InputError(f"--mask_p is {self.mask_p}, expected a number from 0 to 1")
        if self.seq_length is not None and not 2 <= self.seq_length < 10**7:
            raise InputError(f"--seq_length is {self.seq_length}, expected a number from 2 to 9999999")
        if self.validation_steps < 0:
            raise InputError(f"--validation_steps is {self.validation_steps}, expected at least 0")


@dataclass(frozen=True)
class Evaluation:
    """Sums over the labels of some rows, and sizes of the data.

    Attributes:
        num_documents: in the data.
        num_tokens: in the data, without `<s>`.
        sums: over the evaluated rows.
    """

    num_documents: int
    num_tokens: int
    sums: LossSums

    def __add__(self, other: "Evaluation") -> "Evaluation":
        sums = LossSums(self.sums.sums.device)
        sums.sums = self.sums.sums + other.sums.sums
        return Evaluation(self.num_documents + other.num_documents, self.num_tokens + other.num_tokens, sums)

    def means(self) -> dict[Objective, dict[str, float]]:
        """For each objective with labels: loss, perplexity, accuracy, z_loss, count of labels."""
        return self.sums.means(World(0, 1, self.sums.sums.device))


def evaluate_store(trained: TrainedModel, store: TokenStore, settings: ValidationSettings) -> Evaluation:
    """Evaluate a model on documents, with a progress bar.

    Args:
        trained: the model.
        store: documents; padded if they have fewer tokens than a row.
        settings: the run's, possibly modified.
    """
    tokenizer = trained.tokenizer
    validation = Validation(
        settings, store, World(0, 1, trained.device), tokenizer.get_vocab_size(), special_ids(tokenizer)
    )
    is_mixed = settings.mixed_precision and has_bf16(trained.device)
    precision = torch.autocast(trained.device.type, torch.bfloat16, enabled=is_mixed)
    with tqdm(total=validation.num_rows, unit="row", delay=0.5) as bar:
        sums = validation.sums(trained.model, precision, bar.update)
    return Evaluation(store.num_documents, store.num_tokens, sums)


def evaluate(settings: EvaluateSettings) -> None:
    """Evaluate, print the table, write the file.

    Raises:
        InputError: a flag, the data, the checkpoint or the output cannot be used.
    """
    outputs = [settings.output] if settings.output else []
    check_outputs(outputs, [file for path in settings.input for file in (path, *path.rglob("*"))])
    trained = TrainedModel.load(settings)
    of_run = ValidationSettings.from_json(trained.path)
    used = _changed(of_run, settings)
    stores = _open_data(trained, settings)
    unknown = unknown_share(trained.tokenizer, _first_tokens(stores))
    closing = unknown_line(unknown, "DATA")
    with ExitStack() as stack:  # before the work, refuse an output that cannot be written
        staged = [stack.enter_context(staged_outputs(path))[0] for path in outputs]
        domains = {name: evaluate_store(trained, store, used) for name, store in stores.items()}
        first, *others = domains.values()
        together = sum(others, first)
        for file in staged:
            report = {
                "checkpoint": str(trained.path),
                "weights": settings.weights,
                "data": [settings.dataset] if settings.dataset else [str(path) for path in settings.input],
                "seq_length": used.seq_length,
                "mask_p": used.validation_mask_p,
                "validation_steps": used.validation_steps,
                "unknown_tokens": unknown,
                "all": _as_json(together),
            }
            if settings.domain_field:
                report |= {"domain_field": settings.domain_field}
                report |= {"domains": {name: _as_json(result) for name, result in domains.items()}}
            file.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    rows = f"{used.seq_length} tokens a row, {used.validation_mask_p:.0%} masked"
    print(f"{trained.path}, {settings.weights} weights, {rows}\n")
    print(_table([*(domains.items() if settings.domain_field else ()), ("all", together)], settings.domain_field))
    evaluated = sum(int(values["count"]) for values in together.means().values())
    print(f"\n{evaluated:,} labels; {closing}")
    trained.explain()
    if seen := _seen_in_training(trained.path, settings.input, stores.values()):
        print(f"\n{seen} is what the run was trained on (--train_path).")
    if of_run.validation_steps and not settings.validation_steps:
        print(f"\nAll rows; the run itself validated with --validation_steps {of_run.validation_steps}.")
    if of_run.validation_steps is None and not settings.validation_steps and together.num_tokens > DEFAULT_TOKENS:
        print(f"\nAll rows; the run itself validates on {DEFAULT_TOKENS:,} tokens of a file, spread evenly over it.")


def _seen_in_training(checkpoint: Path, files: Iterable[Path], stores: Iterable[TokenStore]) -> str:
    """Which of the data a checkpoint's run was trained on: the first file that its --train_path names, from here.

    Or else "The data", where their content says so; empty if nothing says so.
    """
    named = settings_if_any(checkpoint).get("train_path")
    paths = {Path(path).resolve() for path in (named if isinstance(named, list) else [named]) if isinstance(path, str)}
    if named_here := next((file for file in files if file.resolve() in paths), None):
        return str(named_here)
    digests = corpora_seen(checkpoint)
    return "The data" if digests and any(corpus_digest(store) in digests for store in stores) else ""


def _first_tokens(stores: Mapping[str, TokenStore]) -> list[np.ndarray]:
    """Token ids at the beginnings of each domain's first documents."""
    pieces = [(store, *store.documents(0, min(store.num_documents, _LOOKED_AT))) for store in stores.values()]
    return [store.gather(starts, np.minimum(lengths, _LOOKED_AT))[0] for store, starts, lengths in pieces]


def is_token_file(path: Path) -> bool:
    """Whether a file is of tokens by its content, whatever its name: safetensors, or an archive of torch.save."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(9)
    if start[:2] == b"PK" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    return start[8:] == b"{" and 8 + int.from_bytes(start[:8], "little") <= path.stat().st_size


def _changed(of_run: ValidationSettings, settings: EvaluateSettings) -> ValidationSettings:
    """The run's settings with the command line's applied; longer rows come in smaller batches."""
    seq_length = of_run.seq_length if settings.seq_length is None else settings.seq_length
    return replace(
        of_run,
        seq_length=seq_length,
        local_batch_size=max(1, of_run.local_batch_size * of_run.seq_length // seq_length),
        validation_mask_p=of_run.validation_mask_p if settings.mask_p is None else settings.mask_p,
        validation_steps=settings.validation_steps,
    )


def _open_data(trained: TrainedModel, settings: EvaluateSettings) -> dict[str, TokenStore]:
    """Documents by domain; all under "" without a `domain_field`."""
    token_files = [path for path in settings.input if path.suffix in _TOKEN_FILES or is_token_file(path)]
    if not token_files:
        return encode_domains(trained, settings, settings.domain_field)
    file = token_files[0]
    if len(settings.input) > 1:
        raise InputError(f"{file}: a token file is evaluated on its own; give it alone")
    if settings.domain_field:
        raise InputError(f"--domain_field {settings.domain_field}: the token file {file} has no fields; give JSONL")
    store = TokenStore.open(file)
    if store.tokenizer_hash not in {None, tokenizer_hash(trained.path / TOKENIZER)}:
        raise InputError(f"{file} was written with another tokenizer than that of {trained.path}; tokenize the text")
    if store.vocab_size > (size := trained.tokenizer.get_vocab_size()):
        raise InputError(
            f"{file} has token ids up to {store.vocab_size - 1}, beyond the {size} of the model's tokenizer"
        )
    return {"": store}


def encode_domains(trained: TrainedModel, config: CorpusConfig, domain_field: str | None) -> dict[str, TokenStore]:
    """Documents in memory, two bytes per token for most vocabularies, by the value of a field in order of appearance.

    Args:
        trained: provides the tokenizer.
        config: what to read.
        domain_field: field of JSONL objects; None for one store, named "".

    Raises:
        InputError: a file cannot be read, a line is bad or lacks the field, or there is no text.
    """
    dtype = token_dtype(trained.tokenizer.get_vocab_size())
    batches, domains = [], []  # one domain per document

    def texts(corpus: Corpus) -> Iterator[str]:
        for domain, text in corpus.with_domains():
            domains.append(domain)
            yield text

    try:
        corpus = Corpus(config, domain_field)
        for tokens, lengths, *_ in encode_documents(trained.tokenizer, texts(corpus)):
            batches.append((tokens.astype(dtype), lengths))
        corpus.require_documents()
    except InputError as error:  # the data are positional here, without a flag
        raise InputError(re.sub("^--input:", "DATA:", str(error)).removeprefix("--input ")) from error
    tokens, lengths = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
    names = list(dict.fromkeys(domains))
    number = {name: index for index, name in enumerate(names)}
    domain_of = np.array([number[domain] for domain in domains])
    domain_of_token = np.repeat(domain_of, lengths)
    return {
        name: TokenStore(
            [tokens[domain_of_token == index]],
            [np.concatenate([[0], np.cumsum(lengths[domain_of == index])])],
            trained.tokenizer.get_vocab_size(),
            None,
        )
        for index, name in enumerate(names)
    }


def _as_json(result: Evaluation) -> dict[str, Any]:
    means = {objective.value: values for objective, values in result.means().items()}
    return {"num_documents": result.num_documents, "num_tokens": result.num_tokens, **means}


def _table(results: list[tuple[str, Evaluation]], domain_field: str | None) -> str:
    columns = [f"{objective.value} {name}" for objective in Objective for name in MEASURES]
    rows = [[domain_field or "", "documents", "tokens", *columns]]
    for name, result in results:
        row = [name, f"{result.num_documents:,}", f"{result.num_tokens:,}"]
        means = result.means()
        for objective in Objective:
            if values := means.get(objective):
                row += [f"{values['loss']:.3f}", f"{values['perplexity']:,.1f}", f"{values['accuracy']:.1%}"]
            else:  # no labels
                row += ["-"] * 3
        rows.append(row)
    return table(rows)


def main() -> None:
    """Entry point."""
    run_command(EvaluateSettings, evaluate)


if __name__ == "__main__":
    main()
