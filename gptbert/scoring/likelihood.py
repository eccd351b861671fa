"""Batched log-likelihoods of sentences under both objectives, at any number of temperatures from the same forwards.

For a sentence `<s>` x_1 … x_n and a temperature τ, with log p = log-softmax(logits/τ):

- causal: Σ_i log p(x_i | `<s>` x_1 … x_{i−1}), with causal attention;
- masked: Σ_i log p(x_i | the sentence with `<mask>` for x_i), with bidirectional attention: the pseudo-log-likelihood
  of Salazar et al. (2020, arXiv 1910.14659).

Both objectives predict the *next* token (docs/model.md#rows), so both read x_i from the position before it. The sums
are over all i, or over chosen ones.

Letters of shapes: B rows, T positions, N predictions, V vocabulary, K temperatures.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gptbert.model import GPTBert
from gptbert.model.objective import Objective
from gptbert.text.special_tokens import MASK_ID, PAD_ID

_LOGITS = 1 << 24  # logits in memory at once: 64 MB in fp32

_Key = tuple[tuple[int, ...], tuple[int, ...]]  # a sentence's token ids, and the positions that are predicted


@dataclass(frozen=True)
class _Queries:
    """The predictions of one forward.

    Attributes:
        input_ids: [B, T] int64.
        document_ids: [B, T] int64, −1 for padding.
        rows: [N], row of each prediction.
        positions: [N], position of each prediction; the predicted token follows it.
        targets: [N], the predicted tokens.
        sentences: [N], index of each target's sentence.
    """

    input_ids: np.ndarray
    document_ids: np.ndarray
    rows: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    sentences: np.ndarray


@torch.no_grad()
def log_likelihoods(
    model: GPTBert,
    sentences: Sequence[Sequence[int]],
    objective: Objective,
    temperatures: Sequence[float] = (1.0,),
    batch_tokens: int = 8192,
    advance: Callable[[int], object] = lambda _: None,
    *,
    predicted: Sequence[Sequence[int]] | None = None,
    at_mask: bool = False,
) -> Tensor:
    """Score sentences; equal sentences get bitwise equal scores.

    Args:
        model: in eval mode.
        sentences: token ids, `<s>` first; of any length, since distances are clamped (docs/model.md#position-buckets).
        objective: CLM for the causal score, MLM for the masked one.
        temperatures: K positive numbers that divide the logits.
        batch_tokens: maximum tokens per forward, including padding; at least one row.
        advance: called with the number of predictions just made; `num_predictions` in total.
        predicted: for each sentence the positions to sum over, from 1; None for all behind `<s>`.
        at_mask: read a masked token from its own position, as of a model that was trained to predict it there; this one
            was not.

    Returns:
        [sentences, K] fp64 on the CPU, in nats; 0 for a sentence of only `<s>`.
    """
    keys = _keys(sentences, predicted)
    distinct = list(dict.fromkeys(keys))
    number = {key: index for index, key in enumerate(distinct)}
    scores = torch.zeros(len(distinct), len(temperatures), dtype=torch.float64)
    device = next(model.parameters()).device
    queries_of = _causal_queries(distinct, batch_tokens)
    if not objective.causal:
        queries_of = _masked_queries(distinct, batch_tokens, at_mask)
    for queries in queries_of:
        input_ids, document_ids, rows, positions, targets = (
            torch.from_numpy(array).to(device)
            for array in (queries.input_ids, queries.document_ids, queries.rows, queries.positions, queries.targets)
        )
        hidden_states = model.encode(input_ids, document_ids, objective.causal)[rows, positions]  # [N, D]
        chosen = _log_probabilities(model, hidden_states, targets, temperatures)  # [N, K]
        scores.index_add_(0, torch.from_numpy(queries.sentences), chosen.cpu().double())
        advance(len(targets))
    return scores[[number[key] for key in keys]]


def num_predictions(sentences: Sequence[Sequence[int]], predicted: Sequence[Sequence[int]] | None = None) -> int:
    """Number of tokens that `log_likelihoods` predicts: the `predicted` ones of each distinct sentence."""
    return sum(len(positions) for _, positions in set(_keys(sentences, predicted)))


def _keys(sentences: Sequence[Sequence[int]], predicted: Sequence[Sequence[int]] | None) -> list[_Key]:
    """Each sentence with its predicted positions, to be told from others."""
    if predicted is None:
        predicted = [range(1, len(sentence)) for sentence in sentences]
    return [(tuple(sentence), tuple(positions)) for sentence, positions in zip(sentences, predicted, strict=True)]


def _log_probabilities(model: GPTBert, hidden_states: Tensor, targets: Tensor, temperatures: Sequence[float]) -> Tensor:
    """Log-probabilities [N, K] of `targets` [N] given the hidden states [N, D] before them, at each temperature."""
    pieces = []
    at_once = max(1, _LOGITS // model.config.vocab_size)
    for states, tokens in zip(hidden_states.split(at_once), targets.split(at_once), strict=True):
        logits = model.logits(states).float()  # [N, V]
        chosen = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)  # [N]
        columns = [chosen / temperature - (logits / temperature).logsumexp(dim=-1) for temperature in temperatures]
        pieces.append(torch.stack(columns, dim=-1))
    return torch.cat(pieces)


def num_forwards(sentences: Sequence[Sequence[int]], objective: Objective, batch_tokens: int) -> int:
    """Number of forwards of `log_likelihoods`, after each of which it calls `advance`."""
    lengths = np.sort(np.array([len(sentence) for sentence in set(map(tuple, sentences))], np.int64))
    lengths = lengths[lengths > 1] if objective.causal else np.repeat(lengths, lengths - 1)
    return sum(1 for _ in _batches(lengths, lengths, batch_tokens))


def _causal_queries(passages: Sequence[_Key], batch_tokens: int) -> Iterator[_Queries]:
    """One row per sentence, which predicts all of its tokens that are asked for."""
    lengths, counts = _sizes(passages)
    order = np.argsort(lengths, kind="stable")
    order = order[counts[order] > 0]
    for batch in _batches(order, lengths[order], batch_tokens):
        input_ids, document_ids = _padded([passages[index][0] for index in batch])
        rows = np.repeat(np.arange(len(batch)), counts[batch])
        positions = np.concatenate([np.array(passages[index][1], np.int64) for index in batch])
        yield _Queries(input_ids, document_ids, rows, positions - 1, input_ids[rows, positions], batch[rows])


def _masked_queries(passages: Sequence[_Key], batch_tokens: int, at_mask: bool) -> Iterator[_Queries]:
    """One row per predicted token of every sentence: the sentence with that token masked, which it predicts."""
    lengths, counts = _sizes(passages)
    order = np.argsort(lengths, kind="stable")
    copies = np.repeat(order, counts[order])
    masked = np.array([position for index in order for position in passages[index][1]], np.int64)
    for picked in _batches(np.arange(len(copies)), lengths[copies], batch_tokens):
        batch, positions = copies[picked], masked[picked]
        input_ids, document_ids = _padded([passages[index][0] for index in batch])
        rows = np.arange(len(batch))
        targets = input_ids[rows, positions]
        input_ids[rows, positions] = MASK_ID
        yield _Queries(input_ids, document_ids, rows, positions if at_mask else positions - 1, targets, batch)


def _sizes(passages: Sequence[_Key]) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of sentences, and numbers of their predicted positions, int64."""
    lengths, counts = ([len(passage[part]) for passage in passages] for part in (0, 1))
    return np.array(lengths, np.int64), np.array(counts, np.int64)


def _batches(items: np.ndarray, lengths: np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
    """Batches of consecutive items (sorted by length) that take at most `batch_tokens` when padded to the longest."""
    first = 0
    while first < len(items):
        longest = lengths[first : first + max(1, batch_tokens // int(lengths[first]))]  # of 1, 2, … rows
        fits = int((np.arange(1, len(longest) + 1) * longest <= batch_tokens).sum())
        stop = first + max(1, fits)
        yield items[first:stop]
        first = stop


def _padded(sentences: list[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and document ids, [B, T] each, padded on the right."""
    longest = max(map(len, sentences))
    input_ids = np.full((len(sentences), longest), PAD_ID, np.int64)
    document_ids = np.full((len(sentences), longest), -1, np.int64)
    for row, sentence in enumerate(sentences):
        input_ids[row, : len(sentence)] = sentence
        document_ids[row, : len(sentence)] = 0
    return input_ids, document_ids
