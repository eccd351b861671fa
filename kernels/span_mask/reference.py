"""Span masking in plain PyTorch, in integer arithmetic, so that every device and batch split gives the same bits.

Random numbers are Philox4x32-10 (Salmon et al. 2011) with key = seed and counter = (position, stream, row id). Each
token gets four words: a span length, a selection score, the kind of replacement and a random token. The first three are
used at the start of a span, the fourth at every token. Stream 1 at position 0 is drawn once per row. Probabilities are
fixed-point numbers with 32 fractional bits.
"""

import functools
import math

import torch
from torch import Tensor

from kernels.philox import WORD, philox

IGNORE_INDEX = -100  # label of tokens that are not selected
COUNT_WEIGHTS = tuple(round(128 * math.exp(count)) for count in range(17))  # the product with a 32-bit score fits int64
_NEVER = torch.iinfo(torch.int64).max


def span_mask(
    tokens: Tensor,
    *,
    mask_p: float,
    random_p: float,
    keep_p: float,
    mask_token_id: int,
    vocab_size: int,
    num_special_tokens: int,
    max_span_length: int,
    seed: int,
    row_ids: Tensor,
    mask_counts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `kernels.span_mask`."""
    # 1. Four words per position, [B, T] each; spans tile the row, and every token takes its span's score and kind.
    position = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)  # [B, T]
    length, score, kind, random_token = random_words(seed, position, 0, row_ids[:, None])
    starts = span_starts(_below(max_span_length, length) + 1, max_span_length)
    my_start = torch.where(starts, position, 0).cummax(dim=1).values
    score, kind = score.gather(1, my_start), kind.gather(1, my_start)

    # 2. Select the k lowest scores, [B, T] bool; tokens tied with the k-th, the rest of its span, too.
    selectable = tokens >= num_special_tokens
    if mask_counts is not None:
        score = score * _count_weights(mask_counts, selectable)
    score = torch.where(selectable, score, _NEVER)
    selected = selectable & (score <= _kth_lowest(score, selectable, mask_p, seed, row_ids))

    # 3. Replacement by kind: a random token, the token itself, or <mask>.
    random_token = num_special_tokens + _below(vocab_size - num_special_tokens, random_token)
    replacement = torch.where(kind < fixed_point(random_p + keep_p), tokens, mask_token_id)
    replacement = torch.where(kind < fixed_point(random_p), random_token, replacement)
    inputs = torch.where(selected, replacement, tokens).to(tokens.dtype)
    return inputs, torch.where(selected, tokens, IGNORE_INDEX)


def span_starts(lengths: Tensor, max_span_length: int) -> Tensor:
    """Starts of spans that tile each row from the left.

    Each position is a function from "tokens left in the current span" to its value one position later: 0 starts a span
    of that position's length, anything else counts down. Functions compose, so a scan by doubling gives all prefixes.

    Args:
        lengths: [B, T] int64 in 1 … max_span_length, the length of a span that starts there.
        max_span_length: the number of states.

    Returns:
        [B, T] bool.
    """
    states = torch.arange(max_span_length, device=lengths.device)
    step = torch.where(states == 0, lengths.unsqueeze(-1), states) - 1  # [B, T, states]
    distance = 1
    while distance < lengths.shape[1]:
        composed = step[:, distance:].gather(-1, step[:, :-distance])
        step = torch.cat([step[:, :distance], composed], dim=1)
        distance *= 2
    left_after = step[..., 0]
    return torch.cat([torch.ones_like(left_after[:, :1]), left_after[:, :-1] == 0], dim=1).bool()


def random_words(seed: int, position: Tensor, stream: int, row_ids: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words, in int64, for each counter (position, stream, row id low, row id high)."""
    return philox(seed, position, torch.full_like(position, stream), row_ids & WORD, (row_ids >> 32) & WORD)


def _kth_lowest(score: Tensor, selectable: Tensor, mask_p: float, seed: int, row_ids: Tensor) -> Tensor:
    """[B, 1], the score of the k-th lowest selectable token, k = max(1, ⌊n·p + u⌋)."""
    uniform = random_words(seed, torch.zeros_like(row_ids), 1, row_ids)[0]
    k = ((selectable.sum(dim=1) * fixed_point(mask_p) + uniform) >> 32).clamp(min=1)
    return score.sort(dim=1).values.gather(1, (k - 1).clamp(max=score.shape[1] - 1).unsqueeze(1))


def _count_weights(mask_counts: Tensor, selectable: Tensor) -> Tensor:
    """[B, T], fixed-point softmax(counts) over each row; the divisor is omitted, as it does not change the order."""
    counts = torch.where(selectable, mask_counts.long(), _NEVER)
    above_lowest = (counts - counts.amin(dim=1, keepdim=True)).clamp(max=len(COUNT_WEIGHTS) - 1)
    return _weight_table(counts.device)[above_lowest]


@functools.cache
def _weight_table(device: torch.device) -> Tensor:
    return torch.tensor(COUNT_WEIGHTS, device=device)


def _below(bound: int, word: Tensor) -> Tensor:
    """Map a 32-bit word to 0 … bound − 1."""
    return (word * bound) >> 32


def fixed_point(probability: float) -> int:
    """A probability in fixed point with 32 fractional bits; 1 is 2³²."""
    return round(probability * 2**32)
