"""Shows the results of `make demo` after training: `python -m gptbert.demo RUN_DIR`."""

import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro

from gptbert.checkpoint.folder import list_checkpoints
from gptbert.command_line import run_command
from gptbert.data.token_store import TokenStore
from gptbert.errors import InputError
from gptbert.fill_mask import fill_masks
from gptbert.generate import continue_text
from gptbert.io.names import MEASURES, METRICS
from gptbert.io.screen import table
from gptbert.model.objective import Objective
from gptbert.monitoring.records import read_records
from gptbert.monitoring.validation import unigram_entropy
from gptbert.report import write_report
from gptbert.scoring.trained_model import ModelChoice, TrainedModel

NAMES = {Objective.MLM: "masked (MLM)", Objective.CLM: "causal (CLM)"}
MASKED_TEXTS = (
    "This is a list<mask> strings.",
    "The first argument<mask> the name of the file.",
    "It is an error to use this method if<mask> file is not open.",
)
PROMPT = "The following example shows how to"


@dataclass(frozen=True)
class DemoSettings:
    """Show what a finished demo run learned."""

    run_dir: Annotated[Path, tyro.conf.Positional]
    """The run's folder."""
    valid_path: Path
    """Token file that the run validated on."""
    margin: float = 0.8
    """Nats by which each objective's validation loss must be below the unigram entropy; less is a failure."""


def show(settings: DemoSettings) -> None:
    """Print losses beside the unigram entropy, filled masks and a continuation; write the report.

    Raises:
        InputError: there is no finished run, or it learned less than the margin requires.
    """
    records = read_records(settings.run_dir / METRICS)
    validations = [record for record in records if "validation/mlm/loss" in record]
    if not validations:
        raise InputError(f"{settings.run_dir}: no finished run (its metrics.jsonl holds no validation)")
    store = TokenStore.open(settings.valid_path)
    entropy = unigram_entropy(torch.from_numpy(np.concatenate(store.shards).astype(np.int64)))
    print(f"\nValidation after {validations[-1]['step']} steps, {store.num_tokens:,} tokens")
    rows = [["", "loss (nats)", "perplexity", "accuracy", "below unigram"]]
    for objective, name in NAMES.items():
        loss, ppl, accuracy = (validations[-1][f"validation/{objective.value}/{metric}"] for metric in MEASURES)
        rows.append([name, f"{loss:.3f}", f"{ppl:.1f}", f"{accuracy:.1%}", f"{entropy - loss:.3f}"])
    rows.append(["unigram", f"{entropy:.3f}", f"{np.exp(entropy):.1f}", "", ""])
    print(textwrap.indent(table(rows), "  "))
    _show_samples(settings.run_dir)
    page = write_report(settings.run_dir)
    print(f"\nReport:      {page} (open it in a browser)\nRecords:     {settings.run_dir / 'metrics.jsonl'}")
    print("Checkpoints:")
    for folder in list_checkpoints(settings.run_dir):
        print(f"  {folder}")
    sys.stdout.flush()
    for objective, name in NAMES.items():
        if entropy - validations[-1][f"validation/{objective.value}/loss"] < settings.margin:
            raise InputError(f"{name} ended less than {settings.margin} nat below the unigram entropy {entropy:.3f}")


def _show_samples(run_dir: Path) -> None:
    trained = TrainedModel.load(ModelChoice(run=run_dir, weights="model", device="cpu"))
    print("\nFilled masks")
    for text in MASKED_TEXTS:
        for candidates in fill_masks(trained.model, trained.tokenizer, text):
            guesses = ", ".join(f"{guess!r} {probability:.0%}" for guess, probability in candidates)
            print(f"  {text}  →  {guesses}")
    text = continue_text(trained.model, trained.tokenizer, PROMPT)
    print(f"\nContinuation\n  {' '.join(text.split())}")


def main() -> None:
    """Entry point."""
    run_command(DemoSettings, show)


if __name__ == "__main__":
    main()
