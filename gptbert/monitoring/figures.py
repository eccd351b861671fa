"""Figures that would show a mistake in a run's data: of its rows on the first screen, of labels at the end."""

import numpy as np

from gptbert.config import TrainConfig
from gptbert.data.inputs import Inputs
from gptbert.data.progress import Progress
from gptbert.data.token_store import TokenStore
from gptbert.model.objective import Objective

MOST_UNKNOWN = 0.01  # of the tokens
MOST_PADDING = 0.1  # of the positions
FEWEST_LABELS = 10  # of an objective, in a step
MOST_SHARED = 0.01  # of the validation documents
_SAMPLED = 2**20  # documents, and tokens, of each corpus
_COMPARED, _END = 2**18, 16  # documents of each corpus; tokens at either end of them
_POWERS = np.array([pow(0x9E3779B97F4A7C15, power, 2**64) for power in range(2 * _END + 1)], np.uint64)

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


def of_validation(inputs: Inputs) -> list[str]:
    """A warning if validation documents are training documents too, as far as the first ones of each corpus show it."""
    known = np.concatenate(list(map(_fingerprints, inputs.train_stores)))
    shared = np.isin(_fingerprints(inputs.valid_store), known)
    if not len(shared) or shared.mean() <= MOST_SHARED:
        return []
    line = (
        f"warning: at least {shared.mean():.1%} of the documents of --valid_path are in --train_path too, so that "
        "validation says less of text that the model has not seen (gptbert split makes files without common documents)"
    )
    return [line]


def _fingerprints(store: TokenStore) -> np.ndarray:
    """A number for each of the first documents that are not short, by its length and the tokens at both of its ends."""
    starts, lengths = store.documents(0, min(_COMPARED, store.num_documents))
    starts, lengths = starts[lengths >= _END], lengths[lengths >= _END]
    numbers = [np.empty(0, np.uint64)]
    for first in range(0, len(starts), 2**14):
        begins, sizes = starts[first : first + 2**14], lengths[first : first + 2**14]
        ends = [store.gather(at, np.full_like(at, _END))[0] for at in (begins, begins + sizes - _END)]
        columns = [sizes[:, None], *(tokens.reshape(-1, _END) for tokens in ends)]
        numbers.append(np.concatenate(columns, axis=1).astype(np.uint64) @ _POWERS)  # modulo 2^64
    return np.concatenate(numbers)


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
