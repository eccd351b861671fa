"""Figures that would show a mistake in a run's data: of its rows on the first screen, of labels at the end."""

import numpy as np

from gptbert.config import TrainConfig
from gptbert.data.inputs import Inputs
from gptbert.data.progress import Progress
from gptbert.model.objective import Objective

MOST_UNKNOWN = 0.01  # of the tokens
MOST_PADDING = 0.1  # of the positions
FEWEST_LABELS = 10  # of an objective, in a step
_SAMPLED = 2**20  # documents, and tokens, of each corpus

_OBJECTIVES = {Objective.MLM: "masked", Objective.CLM: "causal"}


def of_rows(config: TrainConfig, inputs: Inputs, progress: Progress) -> list[str]:
    """Lines on how documents become rows: shares of long documents, of padding and of unknown tokens, and warnings.

    Shares of documents and of tokens are those of the first million of each corpus.
    """
    tokens = unknown = documents = longer = 0
    for store in inputs.train_stores:
        for _, ids in store.slices(0, min(_SAMPLED, store.num_tokens)):
            tokens, unknown = tokens + len(ids), unknown + int(np.count_nonzero(ids == inputs.unknown_id))
        _, lengths = store.documents(0, min(_SAMPLED, store.num_documents))
        documents, longer = documents + len(lengths), longer + int(np.count_nonzero(lengths > config.seq_length))
    padding = progress.padding_share()
    line = (
        f"rows of {config.seq_length} tokens: {longer / documents:.0%} of the documents are longer than a row and cut, "
        f"{padding:.2%} of an epoch's positions are padding, {unknown / tokens:.2%} of the tokens are unknown"
    )
    lines = [line]
    if unknown > MOST_UNKNOWN * tokens:
        lines.append("warning: that many unknown tokens mean a tokenizer that was not made for such text")
    if padding > MOST_PADDING:
        lines.append("warning: that much padding means rows too long for the corpus; a shorter --seq_length has less")
    return lines


def of_labels(counts: dict[Objective, float], steps: int) -> list[str]:
    """A line on the labels of a step, and a warning if there are too few to learn from.

    Args:
        counts: labels of the objectives that were trained, at least one, over some steps.
        steps: their number.
    """
    each = {_OBJECTIVES[objective]: count / steps for objective, count in counts.items()}
    lines = [f"labels in each of the last steps: {', '.join(f'{count:,.0f} {name}' for name, count in each.items())}"]
    if few := [name for name, count in each.items() if count < FEWEST_LABELS]:
        lines.append(f"warning: so few {few[0]} labels teach little; a larger --global_batch_size has more")
    return lines
